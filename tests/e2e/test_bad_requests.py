"""Requests that a live server refuses, over the wire, and goes on serving."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import grpc
import pytest

from server.rpc.client import CallError, Client
from server.rpc.generated.fathom.v1 import inference_pb2
from tests.e2e.calls import assert_generates, failure, greedy_request
from tests.e2e.running_server import PATIENCE, RunningServer

Change = Callable[[inference_pb2.GenerateRequest], object]
INVALID = "INVALID_ARGUMENT"

# The demo model has 16 layers, 2048 tokens in its vocabulary and a context of 512.
CASES: dict[str, tuple[Change, str, str]] = {
    "depth 0": (
        lambda r: setattr(r.depth, "layers", 0),
        INVALID,
        "depth.layers: got 0, allowed: 1 to 16",
    ),
    "depth L+1": (
        lambda r: setattr(r.depth, "layers", 17),
        INVALID,
        "depth.layers: got 17, allowed: 1 to 16",
    ),
    "prefill depth L+1": (
        lambda r: setattr(r.prefill_depth, "layers", 17),
        INVALID,
        "prefill_depth.layers: got 17, allowed: 1 to 16",
    ),
    "prune ratio 1": (
        lambda r: setattr(r.depth, "prune_ratio", 1.0),
        INVALID,
        "depth.prune_ratio: got 1.0, allowed: 0 or more and less than 1",
    ),
    "prune ratio NaN": (
        lambda r: setattr(r.depth, "prune_ratio", math.nan),
        INVALID,
        "depth.prune_ratio: got nan, allowed: 0 or more and less than 1",
    ),
    "unknown level": (
        lambda r: setattr(r.depth, "level", "warp"),
        "NOT_FOUND",
        "no level 'warp'; the levels are dense, balanced, fast, turbo",
    ),
    "empty prompt": (
        lambda r: setattr(r, "prompt", ""),
        INVALID,
        "prompt: got '', allowed: at least one token",
    ),
    "no token ids": (
        lambda r: r.token_ids.SetInParent(),
        INVALID,
        "token_ids.ids: got [], allowed: at least one token",
    ),
    "no input": (
        lambda r: r.ClearField("prompt"),
        INVALID,
        "input: got None, allowed: one of prompt, token_ids, chat",
    ),
    "as many token ids as the context holds": (
        lambda r: r.token_ids.ids.extend([5] * 512),
        INVALID,
        "token_ids.ids: got '512 tokens', allowed: at most 511 tokens: the context holds 512",
    ),
    "a token id outside the vocabulary": (
        lambda r: r.token_ids.ids.extend([1, 2048]),
        INVALID,
        "token_ids.ids[1]: got 2048, allowed: 0 to 2047",
    ),
    "the greatest token id": (
        lambda r: r.token_ids.ids.extend([2**32 - 1]),
        INVALID,
        "token_ids.ids[0]: got 4294967295, allowed: 0 to 2047",
    ),
    "max_tokens 0": (
        lambda r: setattr(r.stop, "max_tokens", 0),
        INVALID,
        "stop.max_tokens: got 0, allowed: 1 or more",
    ),
    "a negative temperature": (
        lambda r: setattr(r.sampling, "temperature", -1),
        INVALID,
        "sampling.temperature: got -1.0, allowed: 0 to 2",
    ),
    "a temperature that is no number": (
        lambda r: setattr(r.sampling, "temperature", math.nan),
        INVALID,
        "sampling.temperature: got nan, allowed: 0 to 2",
    ),
    "top_p 0": (
        lambda r: setattr(r.sampling, "top_p", 0.0),
        INVALID,
        "sampling.top_p: got 0.0, allowed: more than 0, up to 1",
    ),
    "too many log-probabilities": (
        lambda r: setattr(r.output, "logprobs", 21),
        INVALID,
        "output.logprobs: got 21, allowed: 0 to 20",
    ),
    "a stop token outside the vocabulary": (
        lambda r: r.stop.stop_token_ids.append(2048),
        INVALID,
        "stop.stop_token_ids[0]: got 2048, allowed: 0 to 2047",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_what_is_allowed(demo_client: Client, case: str) -> None:
    change, code, message = CASES[case]
    request = greedy_request("The list", 3)
    change(request)
    for call in (
        lambda: demo_client.generate(request),
        lambda: list(demo_client.generate_stream(request)),
    ):
        error = failure(call)
        assert (error.code, error.message) == (code, message)
    assert_generates(demo_client)


def test_a_prompt_that_is_longer_than_the_context(demo_client: Client) -> None:
    prompt = "def function(argument): return argument\n" * 200
    ids = demo_client.tokenize(inference_pb2.TokenizeRequest(text=prompt)).ids
    error = failure(lambda: demo_client.generate(greedy_request(prompt, 3)))
    assert (error.code, error.message) == (
        INVALID,
        f"prompt: got '{len(ids)} tokens', allowed: at most 511 tokens: the context holds 512",
    )
    assert_generates(demo_client)


def test_the_longest_prompt_gets_its_one_token(demo_client: Client) -> None:
    response = demo_client.generate(greedy_request([5] * 511, 3, depth=1))
    assert response.finish_info.usage.num_prompt_tokens == 511
    assert len(response.token_ids) == 1
    assert response.finish_info.reason == inference_pb2.FinishInfo.REASON_LENGTH


def test_a_prompt_of_100_megabytes(demo_client: Client) -> None:
    request = greedy_request("x" * 100_000_000, 3)
    error = failure(lambda: demo_client.generate(request))
    assert error.code == "RESOURCE_EXHAUSTED"
    assert str(4 * 2**20) in error.message, "the limit is told"
    assert_generates(demo_client)


def test_a_prompt_of_a_megabyte(demo_client: Client) -> None:
    """It fits into a message, but into no context."""
    error = failure(lambda: demo_client.generate(greedy_request("x y " * 2**18, 3)))
    assert error.code == INVALID
    assert re.fullmatch(
        r"prompt: got '1048576 characters', allowed: at most \d+ characters: the context holds .*",
        error.message,
    )
    assert_generates(demo_client)


@pytest.mark.parametrize(
    "data",
    [b"\x12\x02\xff\xfe", b"\x12\x03\xed\xa0\x80", b"\x12\x7f", b"\xff"],
    ids=["no UTF-8", "half of a surrogate pair", "a string cut short", "no message"],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_bytes_that_are_no_request(
    demo_server: RunningServer, demo_client: Client, data: bytes, method: str
) -> None:
    """Field 2, which the first three begin with, is the prompt."""
    with grpc.insecure_channel(demo_server.address) as channel:
        # The reply to a stream is read as far as its first message, which does not come.
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/fathom.v1.Inference/{method}"
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=PATIENCE)
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith("request: got ")
    assert "strings in UTF-8" in (error.details() or "")
    assert_generates(demo_client)


def test_a_request_id_that_is_running(demo_client: Client) -> None:
    request = greedy_request("The list", 300)
    request.request_id = "twin"
    stream = demo_client.generate_stream(request)
    assert next(stream).prompt_info.request_id == "twin"
    error: CallError = failure(lambda: demo_client.generate(request))
    assert (error.code, error.message) == (
        INVALID,
        "request_id: got 'twin', allowed: an id that no running request has",
    )
    assert [*stream][-1].finish_info.usage.num_generated_tokens == 300
