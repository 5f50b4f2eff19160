"""Limits on the fields of a request, checked in its bytes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidArgument
from server.rpc.generated.fathom.v1 import inference_pb2 as pb
from server.rpc.message_size import check_size, default_message_bytes
from tests.server.rpc.conftest import Deployment, failure, message_of
from tests.server.rpc.toy_engine import MAX_CONTEXT, MODEL

# A context so long that messages which fit it are too large to be decoded at once.
LARGE = replace(MODEL, max_context=2**15)


def descriptor(kind: type[Message]) -> Descriptor:
    return cast(Descriptor, kind.DESCRIPTOR)


def check(message: Message) -> None:
    check_size(message.SerializeToString(), descriptor(type(message)), LARGE)


def chat(num_messages: int, content: str) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role="user", content=content)] * num_messages)


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(prompt="\U0001f600" * 2**15),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1] * 2**15)),
        pb.GenerateRequest(chat=chat(1024, "x" * 32)),
        pb.ScoreRequest(context_text="x" * 2**15, text="y" * 2**15),
        pb.TokenizeRequest(text="x" * 2**15),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_the_context_could_hold_is_decoded(message: Message) -> None:
    check(message)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            pb.GenerateRequest(prompt="x" * 2**18),
            "prompt: got '262144 characters', allowed: at most 3",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2**18)),
            "token_ids.ids: got '26214. bytes', allowed: at most 32767 tokens: the context holds",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2**17)),
            "token_ids.ids: got '13107. numbers', allowed: at most 32767 tokens: the context holds",
        ),
        (pb.GenerateRequest(chat=chat(2, "x" * 2**17)), "chat.messages: got '131072 characters'"),
        (pb.GenerateRequest(chat=chat(2**16, "")), "request: got 'more than 8192 fields'"),
        (pb.GenerateRequest(request_id="x" * 2**18), "request_id: got '262144 bytes', allowed: at"),
        (pb.ScoreRequest(context_ids=pb.TokenIds(ids=[1] * 2**18)), "context_ids.ids: got"),
        (pb.ScoreRequest(text="x", context_text="x" * 2**18), "context_text: got"),
        (
            pb.TokenizeRequest(text="x" * 2**18),
            "text: got '262144 characters', allowed: at most 32",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_it_could_not_hold_is_refused_by_field(message: Message, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        check(message)


def test_a_field_that_comes_in_parts_is_measured_as_a_whole() -> None:
    part = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2**15)).SerializeToString()
    check_size(part, descriptor(pb.GenerateRequest), LARGE)
    with pytest.raises(InvalidArgument, match="token_ids"):
        check_size(part * 7, descriptor(pb.GenerateRequest), LARGE)


def test_groups_and_fields_that_are_unknown() -> None:
    with pytest.raises(InvalidArgument, match="type 3 in"):
        check_size(b"\x7b\x7c" * 2**16, descriptor(pb.GenerateRequest), LARGE)
    with pytest.raises(InvalidArgument, match="more than 8192 fields"):
        check_size(b"\x78\x01" * 2**16, descriptor(pb.GenerateRequest), LARGE)


@given(st.binary(max_size=64), st.sampled_from([pb.GenerateRequest, pb.ScoreRequest]))
def test_any_bytes_are_measured_or_left_to_the_decoder(data: bytes, kind: type[Message]) -> None:
    for padded in (data + b"\x0a\x7f" + bytes(2**15), data * 2**12):
        refused = False
        try:
            check_size(padded, descriptor(kind), MODEL)
        except InvalidArgument:
            refused = True
        message = kind()
        try:
            message.ParseFromString(padded)
        except DecodeError:
            continue
        ids = cast(Any, message).token_ids.ids
        assert refused or len(ids) <= 2 * MAX_CONTEXT + 16 or len(padded) <= 2**14


def test_the_default_limit_fits_the_context() -> None:
    assert default_message_bytes(512) == 2**22
    assert default_message_bytes(2**17) == 2**24
    assert default_message_bytes(2**40) == 2**31 - 1


async def test_nothing_of_a_request_that_is_too_long_is_decoded(deployment: Deployment) -> None:
    # Where it was decoded, its last byte would be found to be malformed.
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2**19)).SerializeToString() + b"\xff"
    async with grpc.aio.insecure_channel(deployment.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/fathom.v1.Inference/Generate"
        )
        error = await failure(call(ids))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"the context holds {MAX_CONTEXT}" in message_of(error)
    assert "token_ids.ids: got" in message_of(error)


async def test_a_long_request_that_comes_too_early_is_not_decoded(starting: Deployment) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2**19))
    error = await failure(starting.client.inference.Generate(request))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "the server is starting" in message_of(error)


async def test_a_reply_of_many_tokens_is_whole(deployment: Deployment) -> None:
    text = "abcd" * 1000
    tokenized = await deployment.client.inference.Tokenize(pb.TokenizeRequest(text=text))
    assert list(tokenized.ids)[1:] == list(text.encode())
    assert "".join(tokenized.tokens) == text
    scored = await deployment.client.inference.Score(pb.ScoreRequest(text=text))
    assert [score.token_id for score in scored.logprobs] == list(text.encode())
    await asyncio.gather(
        *[deployment.client.inference.Tokenize(pb.TokenizeRequest(text=text)) for _ in range(5)]
    )
