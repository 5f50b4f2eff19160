"""Prompts of the operator's page, run like calls of gRPC: same callers, admission and records."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from server.access.authenticator import Authenticator
from server.access.clients import Permission
from server.access.exposure import page_prompts_problem
from server.calls.call_record import CallRecord
from server.calls.caller import Caller, set_caller
from server.calls.generation import FinishInfo, Generation, TextPrompt
from server.config import Settings
from server.engine.base import GenerationDelta, SamplingOptions
from server.errors import DeadlineTooSoon, InvalidArgument
from server.rpc.interceptors import Observer
from server.rpc.status import code_of
from server.serving.service import Service
from server.telemetry.prompt_box import BoxBackend, BoxRequest

# What a prompt of the page is to metrics, log and traces: the same call over another transport.
_METHOD = "fathom.v1.Inference/Generate"

logger = logging.getLogger(__name__)


class PagePrompts:
    """Runs the prompts of the page for those that may call ``Inference``."""

    def __init__(
        self, service: Service, authenticator: Authenticator, observers: Sequence[Observer]
    ) -> None:
        """``observers`` are called with the record of each call at its end."""
        self._service = service
        self._authenticator = authenticator
        self._observers = observers

    def backend(self, settings: Settings) -> BoxBackend:
        """Return what the page calls, off where the settings say so."""
        return BoxBackend(
            self.run,
            self.describe,
            problem=page_prompts_problem(settings),
            only_loopback=settings.page_prompts != "always",
        )

    def describe(self) -> dict[str, object]:
        """Return depths and levels; raise :class:`Unavailable` until the model is known."""
        policy = self._service.policy
        return {
            "num_layers": policy.num_layers,
            "any_depth": policy.any_depth,
            "levels": [
                {"name": level.name, "layers": level.decode_layers} for level in policy.levels
            ],
            "needs_token": self._authenticator.knows_clients,
        }

    async def run(self, request: BoxRequest) -> dict[str, object]:
        """Run a prompt, greedily, and return the answer; raise what calls of gRPC end with."""
        record = CallRecord(_METHOD, caller=Caller(client=request.address, peer=request.address))
        try:
            answer = await self._run(request, record)
        except asyncio.CancelledError:
            self._end(record, "CANCELLED")
            raise
        except Exception as error:
            if isinstance(error, InvalidArgument):
                record.refused_field = error.field
            self._end(record, code_of(error).name)
            raise
        self._end(record, "OK")
        return answer

    async def _run(self, request: BoxRequest, record: CallRecord) -> dict[str, object]:
        client = self._authenticator.by_token(request.token)
        if client is not None:
            record.caller = Caller(client=client.name, peer=request.address, is_known=True)
        self._authenticator.require(Permission.INFERENCE, client)
        set_caller(record.caller)
        generation = Generation(
            TextPrompt(request.prompt),
            depth=request.depth,
            sampling=SamplingOptions(temperature=0.0, max_tokens=request.max_tokens),
        )
        record.begin(generation)
        texts: list[str] = []
        answer: dict[str, object] = {}
        try:
            async with (
                asyncio.timeout(request.timeout_seconds),
                self._service.inference.generate(
                    generation,
                    deadline=time.monotonic() + request.timeout_seconds,
                    may_repeat=True,
                ) as events,
            ):
                async for event in events:
                    record.observe(event)
                    match event:
                        case GenerationDelta():
                            texts.append(event.text)
                        case FinishInfo():
                            answer = {
                                "layers": event.served.decode_layers,
                                "tokens": event.num_generated_tokens,
                                "finish_reason": event.reason.value,
                                "first_token_seconds": event.timings.time_to_first_token,
                                "seconds": event.timings.total,
                            }
        except TimeoutError:
            raise DeadlineTooSoon(f"no answer in {request.timeout_seconds:g} s") from None
        return {"text": "".join(texts), **answer}

    def _end(self, record: CallRecord, code: str) -> None:
        record.end(code)
        for observer in self._observers:
            observer(record)
