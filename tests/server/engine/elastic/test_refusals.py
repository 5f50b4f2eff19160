"""Configurations that the engine refuses, before a process is started for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.errors import InvalidArgument


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kv_cache_gib": 0.001},
            r"kv_cache_gib: got 0\.001, allowed: at least 0\.\d+ for a context of 512 tokens; "
            "or set a smaller max_context",
        ),
        (
            {"kv_cache_gib": 1e300},
            r"kv_cache_gib: got 1e\+300, allowed: at most .* of this machine",
        ),
        ({"max_context": 4096}, "max_context: got 4096, allowed: what vLLM takes: .*512"),
        (
            {"engine_args": {"max_num_batched_token": 8}},
            "engine_args.max_num_batched_token: got 8, allowed: .*max_num_batched_tokens",
        ),
        (
            {"engine_args": {"enforce_eager": False}},
            "engine_args.enforce_eager: got False, allowed: left to Fathom",
        ),
        (
            {"engine_args": {"load_format": "pt"}},
            "engine_args.load_format: got 'pt', allowed: left to Fathom",
        ),
        (
            {"engine_args": {"dtype": "half"}},
            "engine_args.dtype: got 'half', allowed: the setting dtype instead",
        ),
    ],
)
def test_setting_is_refused_by_name(
    settings: dict[str, Any], message: str, demo_model: Path
) -> None:
    engine = ElasticEngine(ElasticConfig(model=demo_model, name="demo", **settings))
    with pytest.raises(InvalidArgument, match=message):
        asyncio.run(engine.start())
