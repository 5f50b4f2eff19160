"""Configurations that the engine refuses, before a process is started for it."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.engine.ranks import Ranks
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
        (
            {"engine_args": {"data_parallel_size": 2, "enable_expert_parallel": True}},
            "engine_args.data_parallel_size: got 2, allowed: 1 with the elastic engine: .*expert",
        ),
        (
            {"engine_args": {"enable_dbo": True}},
            "engine_args.enable_dbo: got True, allowed: False with the elastic engine: .*halves",
        ),
        (
            {"engine_args": {"decode_context_parallel_size": 2}},
            "engine_args.decode_context_parallel_size: got 2, allowed: 1 .*all of a request's keys",
        ),
        (
            {"engine_args": {"enable_lora": True}},
            "engine_args.enable_lora: got True, allowed: False .*without adapters",
        ),
        (
            {"engine_args": {"enable_sleep_mode": True}},
            "engine_args.enable_sleep_mode: got True, allowed: False .*sleeps",
        ),
        (
            {"engine_args": {"speculative_config": {"method": "ngram"}}},
            "engine_args.speculative_config: got {'method': 'ngram'}, allowed: None .*draft",
        ),
        (
            {"engine_args": {"spec_method": "ngram"}},
            "engine_args.spec_method: got 'ngram', allowed: None .*draft",
        ),
    ],
)
def test_setting_is_refused_by_name(
    settings: dict[str, Any], message: str, demo_model: Path
) -> None:
    engine = ElasticEngine(ElasticConfig(model=demo_model, name="demo", **settings))
    with pytest.raises(InvalidArgument, match=message):
        asyncio.run(engine.start())


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a CPU has no room for it")
def test_pipeline_parallel_is_refused_on_cpu(demo_model: Path) -> None:
    ranks = Ranks(pipeline_parallel_size=2)
    engine = ElasticEngine(ElasticConfig(model=demo_model, name="demo", ranks=ranks))
    message = "^pipeline_parallel_size: got 2, allowed: 1: .*use tensor_parallel_size"
    with pytest.raises(InvalidArgument, match=message):
        asyncio.run(engine.start())


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a CPU cannot be in a Ray cluster")
def test_ray_is_refused_on_cpu(demo_model: Path) -> None:
    ranks = Ranks(tensor_parallel_size=2, backend="ray")
    engine = ElasticEngine(ElasticConfig(model=demo_model, name="demo", ranks=ranks))
    with pytest.raises(InvalidArgument, match=r"^distributed_executor_backend: got 'ray', al"):
        asyncio.run(engine.start())


def test_heads_that_cannot_be_divided_are_refused(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    ranks = Ranks(tensor_parallel_size=3)
    engine = ElasticEngine(ElasticConfig(model=demo_model, name="demo", ranks=ranks))
    with pytest.raises(InvalidArgument, match=r"^tensor_parallel_size: got 3, .*heads \(4\)"):
        asyncio.run(engine.start())


def test_arguments_that_change_nothing_are_accepted(demo_model: Path) -> None:
    from server.engine.elastic.engine_arguments import vllm_arguments

    settings = {"data_parallel_size": 1, "enable_lora": False, "speculative_config": None}
    arguments = vllm_arguments(ElasticConfig(model=demo_model, name="demo", engine_args=settings))
    assert arguments.data_parallel_size == 1


def test_every_argument_that_is_not_supported_is_one_of_vllm() -> None:
    from vllm import AsyncEngineArgs

    from server.engine.elastic.unsupported_arguments import _UNSUPPORTED

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert known >= _UNSUPPORTED.keys()
