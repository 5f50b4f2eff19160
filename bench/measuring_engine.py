"""The engine of benchmarks that measure what a model does, not how fast."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

import typer

from bench.options import Options
from bench.random_model import DTYPES
from server.calibration.text_windows import text_windows
from server.engine.arguments import DtypeName
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.model.source import ModelSource, find_model

# Speed is measured on random weights by default, nothing else can be.
_MODELS = {"random": "smollm2"}


def measured_model(options: Options) -> ModelSource:
    """Return the model that the options name; raises what :func:`find_model` does."""
    return find_model(_MODELS.get(options.model, options.model))


def measuring_engine(options: Options, source: ModelSource) -> ElasticEngine:
    """Return an engine for ``source``, which has not been started.

    Raises :class:`typer.BadParameter` for a type that there is not.
    """
    if options.dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: allowed: {', '.join(DTYPES)}")
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    return ElasticEngine(
        ElasticConfig(
            model=source.directory,
            name=source.name,
            dtype=cast(DtypeName, options.dtype),
            max_context=options.max_context,
            max_num_seqs=64,
            kv_cache_gib=1.0,
            compile_layers=options.compile_layers,
            engine_args=options.fathom_engine_args(),
        )
    )


def engine_windows(engine: ElasticEngine, texts: Sequence[str], num_tokens: int) -> list[list[int]]:
    """Return windows of ``texts`` that the engine can run, of at most so many tokens together."""
    return text_windows(
        engine.tokenize,
        texts,
        max_context=engine.model.max_context,
        max_tokens=num_tokens,
        vocab_size=engine.model.vocab_size,
    )
