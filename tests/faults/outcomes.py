"""How requests end while something goes wrong: answered, refused, or lost."""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from server.rpc.client import AsyncClient, retry_delay
from server.rpc.generated.fathom.v1 import inference_pb2

# No request takes as long, unless it is lost.
PATIENCE = 240.0
# What a client may try again, elsewhere or later.
PROPER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


class Outcome(enum.Enum):
    """``REFUSED`` is a proper status; ``WRONG`` and ``LOST`` must not be."""

    ANSWERED = "answered"
    REFUSED = "refused"
    WRONG = "wrong"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request whose answer is known."""

    request: inference_pb2.GenerateRequest
    expected: tuple[int, ...]
    is_stream: bool


@dataclass
class Crowd:
    """Sends requests all at once, and counts how they end.

    Streams are counted once the engine has been given them, and once it has begun them.
    """

    client: AsyncClient
    # Whether a proper status must say when to try again.
    expects_retry_info: bool = True
    num_admitted: int = 0
    num_begun: int = 0
    problems: list[str] | None = None

    async def send(
        self, crowd: Sequence[Asked], fault: Callable[[], None], *, after: int
    ) -> Counter[Outcome]:
        """Inject the fault as soon as ``after`` streams have begun."""
        self.num_admitted, self.num_begun, self.problems = 0, 0, []
        tasks = [asyncio.create_task(self._one(asked)) for asked in crowd]
        while self.num_begun < after:
            await asyncio.sleep(0.005)
        fault()
        outcomes = Counter(await asyncio.gather(*tasks))
        assert outcomes.total() == len(crowd)
        return outcomes

    async def _one(self, asked: Asked) -> Outcome:
        received: list[int] = []
        try:
            async with asyncio.timeout(PATIENCE):
                is_complete = await (self._stream if asked.is_stream else self._unary)(
                    asked.request, received
                )
        except TimeoutError:
            return self._problem(Outcome.LOST, "no end")
        except grpc.aio.AioRpcError as error:
            if error.code() not in PROPER:
                return self._problem(Outcome.WRONG, f"{error.code()}: {error.details()}")
            if self.expects_retry_info and retry_delay(error) is None:
                return self._problem(Outcome.WRONG, f"no retry info: {error.details()}")
            if tuple(received) != asked.expected[: len(received)]:
                return self._problem(Outcome.WRONG, f"not the beginning: {received}")
            return Outcome.REFUSED
        if not is_complete:
            return self._problem(Outcome.LOST, "the stream ended without an end")
        if tuple(received) != asked.expected:
            return self._problem(Outcome.WRONG, f"{received} for {asked.expected}")
        return Outcome.ANSWERED

    async def _stream(self, request: inference_pb2.GenerateRequest, received: list[int]) -> bool:
        is_complete = False
        async for message in self.client.inference.GenerateStream(request):
            if message.HasField("prompt_info"):
                self.num_admitted += 1
            if message.HasField("delta"):
                if not received:
                    self.num_begun += 1
                received.extend(message.delta.token_ids)
            is_complete = message.HasField("finish_info")
        return is_complete

    async def _unary(self, request: inference_pb2.GenerateRequest, received: list[int]) -> bool:
        response = await self.client.inference.Generate(request)
        received.extend(response.token_ids)
        return bool(response.finish_info.usage.num_generated_tokens == len(received))

    def _problem(self, outcome: Outcome, what: str) -> Outcome:
        assert self.problems is not None
        self.problems.append(f"{outcome.value}: {what}")
        return outcome
