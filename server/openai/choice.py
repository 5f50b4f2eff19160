"""One choice of an answer, from Fathom's events to vLLM's outputs."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from server.calls.generation import GenerationEvent, PromptInfo
from server.engine.base import FinishReason, GenerationDelta, TokenScore
from server.openai.call import Call


class Choice:
    """The request for one choice of a prompt, and what it has brought so far."""

    def __init__(self, call: Call, prompt: int, index: int) -> None:
        self.request = call.generation(prompt, index)
        self._call = call
        self._prompt = prompt
        self._index = index
        self._prompt_ids: Sequence[int] = ()
        self._prompt_text = ""
        self._awaits_echo = call.echo
        self._deltas: list[GenerationDelta] = []

    def add(self, event: GenerationEvent) -> RequestOutput | None:
        """Take an event; return what it adds to the answer, if that is to be streamed."""
        self._call.observe(event, self._prompt, self._index)
        match event:
            case PromptInfo():
                self._prompt_ids = event.prompt_ids
            case GenerationDelta() if self._awaits_echo:
                self._prompt_text = event.text
                self._awaits_echo = False
            case GenerationDelta() if self._call.is_stream:
                return self._output([event])
            case GenerationDelta():
                self._deltas.append(event)
        return None

    def whole_output(self) -> RequestOutput:
        """Return the whole answer."""
        return self._output(self._deltas)

    def _output(self, deltas: Sequence[GenerationDelta]) -> RequestOutput:
        sampling, last = self.request.sampling, deltas[-1]
        logprobs = prompt_logprobs = None
        if sampling.logprobs is not None:
            logprobs = [_logprobs(score) for delta in deltas for score in delta.scores]
        if sampling.prompt_logprobs is not None:
            scores = deltas[0].prompt_scores
            prompt_logprobs = [None, *map(_logprobs, scores)] if scores else None
            if prompt_logprobs is None and len(self._prompt_ids) == 1:
                prompt_logprobs = [None]
        return RequestOutput(
            self.request.request_id,
            self._prompt_text,
            list(self._prompt_ids),
            prompt_logprobs,
            [
                CompletionOutput(
                    self._index,
                    "".join(delta.text for delta in deltas),
                    [token_id for delta in deltas for token_id in delta.token_ids],
                    None,
                    logprobs,
                    finish_reason=_reason(last.finish_reason),
                    stop_reason=last.stopped_by,
                )
            ],
            last.finish_reason is not None,
            num_cached_tokens=deltas[0].num_cached_tokens,
        )


def _logprobs(score: TokenScore) -> dict[int, Logprob]:
    return {each.token_id: Logprob(each.logprob, None, each.text) for each in (score, *score.top)}


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
