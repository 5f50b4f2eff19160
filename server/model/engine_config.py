"""The configuration of engines, as the settings have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.config import Settings
from server.engine.elastic.engine_arguments import ElasticConfig
from server.engine.ranks import Ranks


def engine_config(settings: Settings, model: Path, name: str) -> dict[str, Any]:
    """Return the fields of :class:`EngineConfig` for the checkpoint ``model``."""
    return {
        "model": model,
        "name": name,
        "dtype": settings.dtype,
        "max_context": settings.max_context,
        "max_num_seqs": settings.max_num_seqs,
        "kv_cache_gib": settings.kv_cache_gib,
        "trust_remote_code": settings.trust_remote_code,
        "huge_pages": settings.huge_pages,
        "ranks": Ranks(
            settings.tensor_parallel_size,
            settings.pipeline_parallel_size,
            settings.distributed_executor_backend,
        ),
        "engine_args": settings.engine_args,
    }


def elastic_config(settings: Settings, model: Path, name: str) -> ElasticConfig:
    return ElasticConfig(
        **engine_config(settings, model, name),
        compile_layers=settings.compile_layers,
        compile_cache=settings.state_dir / "compiled",
    )
