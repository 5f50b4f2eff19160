"""The call that a task serves, beside what vLLM's serving classes know of it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus

from vllm.exceptions import GenerationError

from server.calls.call_record import CallRecord
from server.calls.generation import FinishInfo, Generation, GenerationEvent, Prompt, PromptInfo
from server.depth.served_depth import ServedDepth
from server.engine.base import SamplingOptions
from server.errors import FathomError
from server.openai.depth_names import Depths
from server.openai.failures import failure_of


class Refused(GenerationError):
    """An error of Fathom's on its way through vLLM's serving classes, which stream it as it is."""

    def __init__(self, error: FathomError) -> None:
        super().__init__(str(error))
        self.status_code = HTTPStatus(failure_of(error).status)
        self.error = error


# The key under which vLLM's serving classes carry the number of a prompt in the call.
PROMPT = "fathom_prompt"


@dataclass(slots=True)
class Call:
    """One request for text: its prompts, each with as many choices, and what becomes of them."""

    record: CallRecord
    # The name of the model, as the client has written it.
    model: str
    depths: Depths
    prompts: Sequence[Prompt]
    num_choices: int
    is_stream: bool
    echo: bool
    cache_salt: str
    # Returns the options of a choice, counted from 0.
    sampling: Callable[[int], SamplingOptions]
    # Empty: none was given.
    request_id: str
    response_id: str = ""
    # By prompt and choice.
    served: dict[tuple[int, int], ServedDepth] = field(default_factory=dict)
    # The first error that ended a choice, and with it the call.
    error: FathomError | None = None

    def __post_init__(self) -> None:
        self.response_id = self.request_id or uuid.uuid4().hex
        self.record.request_id = self.response_id

    def generation(self, prompt: int, choice: int) -> Generation:
        """Return what one choice of a prompt asks the service for."""
        request_id = self.response_id
        if self.num_choices * len(self.prompts) > 1:
            request_id = f"{request_id}-{prompt}-{choice}"
        depth, prefill_depth = self.depths
        return Generation(
            self.prompts[prompt],
            depth=depth,
            prefill_depth=prefill_depth,
            sampling=self.sampling(choice),
            echo=self.echo,
            request_id=request_id,
            cache_salt=self.cache_salt,
        )

    def observe(self, event: GenerationEvent, prompt: int, choice: int) -> None:
        """Note what a choice's request has brought."""
        record = self.record
        match event:
            case PromptInfo():
                self.served[prompt, choice] = event.served
                record.served = record.served or event.served
                if choice == 0:
                    total = record.num_prompt_tokens or 0
                    record.num_prompt_tokens = total + event.num_prompt_tokens
            case FinishInfo() if record.finish_reason is not None:
                pass
            case _:
                record.observe(event)

    def refuse(self, error: FathomError) -> Refused:
        """Return the error for vLLM's classes, and remember the first."""
        self.error = self.error or error
        self.record.late_error = self.error
        return Refused(error)


_call: ContextVar[Call] = ContextVar("openai_call")


def current() -> Call:
    """Return the call that this task serves."""
    return _call.get()


def set_current(call: Call) -> None:
    _call.set(call)
