"""The ranks of tokens among all others, which vLLM reports beside log-probabilities.

vLLM compiles the function when log-probabilities are first asked for. On CPU that takes a C++
compiler seconds, in which every client's stream stands still, to save microseconds of each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Rows that are compared at a time: of the largest vocabularies, some 16 MiB.
_ROWS = 64
_FUNCTION = "batched_count_greater_than"


def count_uncompiled() -> None:
    """Have vLLM's sampler in this process count ranks without compiling anything, on CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.sample import sampler

        assert _FUNCTION in vars(sampler), f"this vLLM's sampler has no {_FUNCTION}"
        vars(sampler)[_FUNCTION] = ranks


def ranks(logprobs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return for each row how many of its entries are at least its value.

    ``logprobs`` is rows x vocabulary, ``values`` rows x 1; the result has one number per row.
    """
    import torch

    pieces = zip(logprobs.split(_ROWS), values.split(_ROWS), strict=True)
    return torch.cat([(piece >= value).sum(-1) for piece, value in pieces])
