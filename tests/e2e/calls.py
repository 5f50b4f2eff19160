"""Requests of the tests, many at once, and what comes back as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pytest

from server.rpc.client import CallError, Client
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2

# Close to what a context of 512 tokens holds beside a short prompt.
LONG = 480

S = TypeVar("S")
T = TypeVar("T")


def greedy_request(
    prompt: str | Sequence[int],
    max_tokens: int,
    *,
    depth: int | None = None,
    prefill_depth: int | None = None,
) -> inference_pb2.GenerateRequest:
    """Return a request whose answer depends on nothing but the model and the depths."""
    request = inference_pb2.GenerateRequest(
        sampling=inference_pb2.SamplingParams(temperature=0),
        stop=inference_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        output=inference_pb2.OutputOptions(token_ids=True),
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.token_ids.ids.extend(prompt)
    if depth is not None:
        request.depth.layers = depth
    if prefill_depth is not None:
        request.prefill_depth.layers = prefill_depth
    return request


@dataclass(frozen=True, slots=True)
class Streamed:
    """The messages of a stream by their kind; made of a stream in the right order alone."""

    prompt_info: inference_pb2.PromptInfo
    deltas: list[inference_pb2.Delta]
    finish_info: inference_pb2.FinishInfo

    @classmethod
    def of(cls, messages: Iterable[inference_pb2.GenerateStreamResponse]) -> Streamed:
        first, *middle, last = messages
        kinds = [message.WhichOneof("event") for message in (first, *middle, last)]
        assert kinds == ["prompt_info", *["delta"] * len(middle), "finish_info"]
        return cls(first.prompt_info, [message.delta for message in middle], last.finish_info)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def logprobs(self) -> list[inference_pb2.TokenLogprob]:
        return [logprob for delta in self.deltas for logprob in delta.logprobs]


def at_once(function: Callable[[S], T], arguments: Sequence[S]) -> list[T]:
    """Call the function with all of the arguments at the same time."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))


def failure(call: Callable[[], object]) -> CallError:
    """Return the error that the call ends with."""
    with pytest.raises(CallError) as caught:
        call()
    return caught.value


def requested(prefill_layers: int, decode_layers: int) -> common_pb2.Served:
    """Return the depth in the answer to a request that named these depths."""
    return common_pb2.Served(
        prefill_layers=prefill_layers,
        decode_layers=decode_layers,
        reason=common_pb2.Served.REASON_REQUESTED,
    )


def assert_generates(client: Client) -> None:
    """A server that has refused something goes on serving."""
    response = client.generate(greedy_request("The list", 3))
    assert len(response.token_ids) == 3
