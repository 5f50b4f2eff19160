"""Arguments of vLLM's engine that the elastic engine cannot do, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.engine.ranks import Ranks
from server.errors import InvalidArgument

_DATA_PARALLEL = (
    "layers are measured on texts that one engine has to see whole, and with expert parallelism "
    "all engines would have to run the same layers; start one server for each copy of the model"
)
_SPECULATIVE = "a draft is made for a model that runs all of its layers"
_MICROBATCHES = "the two halves of a batch would take each other's choice of layers"
_CONTEXT_PARALLEL = "attention for some of a step's tokens needs all of a request's keys and values"

# name -> what is allowed, and why nothing else is
_UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "data_parallel_size": ((1,), _DATA_PARALLEL),
    "data_parallel_rank": ((None, 0), _DATA_PARALLEL),
    "data_parallel_external_lb": ((False,), _DATA_PARALLEL),
    "data_parallel_hybrid_lb": ((False,), _DATA_PARALLEL),
    "data_parallel_multi_port_external_lb": ((False,), _DATA_PARALLEL),
    "enable_dbo": ((False,), _MICROBATCHES),
    "ubatch_size": ((0,), _MICROBATCHES),
    "decode_context_parallel_size": ((1,), _CONTEXT_PARALLEL),
    "prefill_context_parallel_size": ((1,), _CONTEXT_PARALLEL),
    "kv_sharing_fast_prefill": ((False,), "it skips tokens by itself, apart from their depth"),
    "enable_lora": ((False,), "keys and values of skipped layers are made without adapters"),
    "enable_sleep_mode": ((False,), "an engine that sleeps would lose its choice of layers"),
    "speculative_config": ((None,), _SPECULATIVE),
    "spec_method": ((None,), _SPECULATIVE),
    "spec_model": ((None,), _SPECULATIVE),
    "spec_tokens": ((None,), _SPECULATIVE),
}
_PIPELINE = (
    "on CPU, vLLM's eager mode makes no room for what one process hands to the next, and would "
    "end with the first request; use tensor_parallel_size"
)


def check_supported(engine_args: Mapping[str, Any], ranks: Ranks, *, on_cpu: bool) -> None:
    """Raise :class:`InvalidArgument`, with the reason, for what the elastic engine cannot do."""
    if on_cpu and ranks.pipeline_parallel_size > 1:
        raise InvalidArgument(
            "pipeline_parallel_size", ranks.pipeline_parallel_size, f"1: {_PIPELINE}"
        )
    for name, value in engine_args.items():
        allowed, reason = _UNSUPPORTED.get(name, ((value,), ""))
        if value not in allowed:
            raise InvalidArgument(
                f"engine_args.{name}",
                value,
                f"{' or '.join(map(str, allowed))} with the elastic engine: {reason}",
            )
