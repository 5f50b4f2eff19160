"""What is known of a call when it has ended: for metrics, the log and traces.

There is no text of clients in it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.calls.caller import Caller
from server.calls.generation import (
    ChatPrompt,
    FinishInfo,
    Generation,
    GenerationEvent,
    PromptInfo,
    RenderedPrompt,
)
from server.depth.served_depth import ServedDepth
from server.engine.base import FinishReason, GenerationDelta, SamplingOptions

# Requests with longer ids are refused.
_LONGEST_ID = 128


@dataclass(slots=True)
class CallRecord:
    """One call; times are in seconds since its arrival, None for steps that it did not reach."""

    # Without a leading slash: fathom.v1.Inference/Generate.
    method: str
    # Time of arrival in nanoseconds since the epoch.
    arrived_at: int = field(default_factory=time.time_ns)
    arrived: float = field(default_factory=time.monotonic)
    caller: Caller = field(default_factory=Caller)
    # Headers of the client's trace context.
    trace_headers: dict[str, str] = field(default_factory=dict)
    request_id: str = ""
    sampling: SamplingOptions | None = None
    is_chat: bool = False
    served: ServedDepth | None = None
    num_prompt_tokens: int | None = None
    num_generated_tokens: int = 0
    num_cached_tokens: int | None = None
    queue: float | None = None
    time_to_first_token: float | None = None
    finish_reason: FinishReason | None = None
    total: float = 0.0
    # The name of the status code.
    code: str = ""
    # The field of the request that was refused.
    refused_field: str = ""
    # Whether the answer is sent as it is made; None: the method says so.
    is_stream: bool | None = None
    # Of a call over HTTP; None for one over gRPC, and where nothing was answered.
    http_status: int | None = None
    # What ended an answer after its beginning had been sent.
    late_error: Exception | None = None

    @property
    def depth(self) -> str:
        """The label of metrics: decode layers, empty for a call that was refused before."""
        return "" if self.served is None else str(self.served.decode_layers)

    def begin(self, request: Generation) -> None:
        """Record what the client asks for."""
        self.request_id = request.request_id[:_LONGEST_ID]
        self.sampling = request.sampling
        self.is_chat = isinstance(request.prompt, ChatPrompt | RenderedPrompt)

    def observe(self, event: GenerationEvent) -> None:
        """Note what the client is about to be told."""
        match event:
            case PromptInfo():
                self.request_id, self.served = event.request_id, event.served
                self.num_prompt_tokens = event.num_prompt_tokens
            case GenerationDelta() if event.token_ids:  # an echo has none
                if self.time_to_first_token is None:
                    self.time_to_first_token = time.monotonic() - self.arrived
                    self.num_cached_tokens = event.num_cached_tokens
                self.num_generated_tokens += len(event.token_ids)
            case FinishInfo():
                self.served, self.finish_reason = event.served, event.reason
                self.queue = event.timings.queue

    def end(self, code: str) -> None:
        self.code = code
        self.total = time.monotonic() - self.arrived


_current: ContextVar[CallRecord] = ContextVar("call_record")


def current_call() -> CallRecord:
    """Return the record of the call that this task serves."""
    return _current.get()


def set_current_call(record: CallRecord) -> None:
    _current.set(record)
