"""The size of the KV cache on GPUs, as far as it can be known without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.engine.arguments import GIB, EngineConfig, gpu_arguments
from server.engine.elastic.engine_arguments import ElasticConfig, vllm_arguments
from server.engine.ranks import Ranks
from server.errors import InvalidArgument

GPU_BYTES = 80 * GIB


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    kind = type(current_platform)
    monkeypatch.setattr(kind, "is_cpu", lambda self: False)
    monkeypatch.setattr(
        kind, "get_device_total_memory", classmethod(lambda cls, device_id=0: GPU_BYTES)
    )


def config(model: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(model=model, name="m", **settings)


@pytest.mark.parametrize(
    ("ranks", "share", "expected"),
    [(Ranks(), 1.0, 3 * GIB // 2), (Ranks(), 0.5, 3 * GIB // 4), (Ranks(2), 1.0, 3 * GIB // 4)],
)
def test_a_size_is_that_of_all_gpus_together(
    ranks: Ranks, share: float, expected: int, demo_model: Path
) -> None:
    given = config(demo_model, kv_cache_gib=1.5, ranks=ranks)
    assert gpu_arguments(given, share) == {"kv_cache_memory_bytes": expected}


def test_without_a_size_vllm_decides(demo_model: Path) -> None:
    assert gpu_arguments(config(demo_model)) == {}


def test_more_than_the_gpus_have_is_refused(demo_model: Path) -> None:
    gpu_arguments(config(demo_model, kv_cache_gib=160, ranks=Ranks(2)))
    with pytest.raises(InvalidArgument, match=r"kv_cache_gib: got 1e\+300, allowed: at most 80, "):
        gpu_arguments(config(demo_model, kv_cache_gib=1e300))


def test_the_elastic_engine_asks_for_it_unless_the_operator_gives_bytes(demo_model: Path) -> None:
    given: dict[str, Any] = {"model": demo_model, "name": "m", "kv_cache_gib": 0.5}
    arguments = vllm_arguments(ElasticConfig(**given))
    assert arguments.kv_cache_memory_bytes == GIB // 2
    arguments = vllm_arguments(
        ElasticConfig(**given, engine_args={"kv_cache_memory_bytes": 1 << 20})
    )
    assert arguments.kv_cache_memory_bytes == 1 << 20
