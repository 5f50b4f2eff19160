"""Ranks: the processes that one copy of the model is spread over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from server.errors import InvalidArgument

Backend = Literal["mp", "ray"]
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
# What vLLM's reasons call a setting -> the setting
_PHRASES = {
    "tensor parallel size": "tensor_parallel_size",
    "tensor_parallel_size": "tensor_parallel_size",
    "number of available GPUs": "tensor_parallel_size",
    "pipeline parallel": "pipeline_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "Ray": "distributed_executor_backend",
}


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many processes share a model, and what starts them; see the settings of these names."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    backend: Backend | None = None

    @property
    def number(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def refused_setting(self, reason: str) -> tuple[str, int | str] | None:
        """Return name and value of the setting that vLLM's ``reason`` speaks of, if any."""
        values: dict[str, int | str | None] = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "distributed_executor_backend": self.backend,
        }
        for phrase, name in _PHRASES.items():
            value = values[name]
            if phrase in reason and value not in (1, None):
                return name, value
        return None


ONE_PROCESS = Ranks()


class CoreBinding:
    """The cores that vLLM binds each rank's threads to, in the variable that it reads.

    vLLM's own choice is a NUMA node for each rank, and most machines have fewer.
    """

    def __init__(self) -> None:
        self._chosen: str | None = None

    def choose(self, ranks: Ranks, cores: list[int]) -> None:
        """Give each rank an equal part of ``cores``, unless the operator has chosen.

        Raises :class:`InvalidArgument` for more ranks than cores.
        """
        if os.environ.get(_BINDING) not in (None, self._chosen):
            return
        if ranks.number > len(cores):
            name, value = max(
                ("pipeline_parallel_size", ranks.pipeline_parallel_size),
                ("tensor_parallel_size", ranks.tensor_parallel_size),
                key=lambda setting: setting[1],
            )
            raise InvalidArgument(
                name,
                value,
                f"at most {len(cores)} processes in all here, one for each core; {_BINDING}=nobind "
                "lets more of them share the cores",
            )
        size = len(cores) // ranks.number
        parts = [cores[rank * size : (rank + 1) * size] for rank in range(ranks.number)]
        self._chosen = "|".join(",".join(map(str, part)) for part in parts)
        os.environ[_BINDING] = self._chosen


_BOUND = CoreBinding()


def bind_to_cores(ranks: Ranks) -> None:
    """Give each rank its part of this process's cores; see :meth:`CoreBinding.choose`."""
    _BOUND.choose(ranks, sorted(os.sched_getaffinity(0)))
