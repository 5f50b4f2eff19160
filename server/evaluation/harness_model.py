"""A live server as a model of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2

T = TypeVar("T")

# Requests that run at a time.
_NUM_CALLS = 16
_MAX_TOKENS = 256


class ServerModel(LM):  # type: ignore[misc]  # the harness carries no types
    """Scores and generates at one depth of a server.

    A context runs at the prefill depth and what is scored at the decode depth, as generated text
    would. The server tokenizes context and continuation as the one text that they make. Without a
    context, all tokens but the first are scored.
    """

    def __init__(
        self,
        client: Client,
        depth: common_pb2.Depth,
        prefill_depth: common_pb2.Depth | None = None,
    ) -> None:
        super().__init__()
        self._client = client
        self._depth = depth
        self._prefill_depth = prefill_depth
        # What the server has said it served last.
        self.served: common_pb2.Served | None = None

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability in nats, and whether it is the greedy one."""
        return self._all(self._scored, [request.args for request in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability in nats of each text, which must fit into the context."""
        texts = [("", request.args[0]) for request in requests]
        return [logprob for logprob, _ in self._all(self._scored, texts)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what is generated after each context, until one of its stop strings."""
        return self._all(self._generated, [request.args for request in requests])

    def _scored(self, texts: tuple[str, str]) -> tuple[float, bool]:
        context, continuation = texts
        # A space at the end belongs to the word after it.
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        response = self._client.score(
            inference_pb2.ScoreRequest(
                context_text=stripped or None,
                text=continuation,
                depth=self._depth,
                prefill_depth=self._prefill_depth,
            )
        )
        self.served = response.served
        return response.total_logprob, all(score.is_greedy for score in response.logprobs)

    def _generated(self, arguments: tuple[str, dict[str, Any]]) -> str:
        context, options = arguments
        stop = options.get("until") or []
        response = self._client.generate(
            inference_pb2.GenerateRequest(
                prompt=context,
                depth=self._depth,
                prefill_depth=self._prefill_depth,
                sampling=inference_pb2.SamplingParams(
                    temperature=options.get("temperature", 0.0) if options.get("do_sample") else 0.0
                ),
                stop=inference_pb2.StopConditions(
                    stop=[stop] if isinstance(stop, str) else stop,
                    max_tokens=options.get("max_gen_toks", _MAX_TOKENS),
                ),
            )
        )
        self.served = response.served
        return response.text

    def _all(self, run: Callable[[Any], T], arguments: Sequence[Any]) -> list[T]:
        with ThreadPoolExecutor(_NUM_CALLS) as threads:
            return list(threads.map(run, arguments))
