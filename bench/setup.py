"""The setup of benchmarks that put loads on engines."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from bench.lengths import Lengths
from bench.models import BenchModel, prepare_model
from bench.options import Options, option
from bench.subjects.base import EngineSettings, prepare
from bench.workload import Workload


@dataclass(frozen=True)
class LoadOptions(Options):
    """Options of benchmarks whose prompts and outputs have chosen lengths."""

    prompt_tokens: str = option("16", "Lengths of prompts; see bench/README.md for distributions.")
    output_tokens: str = option("64", "Lengths of outputs, likewise.")

    @property
    def prompt_lengths(self) -> Lengths:
        return _lengths(self.prompt_tokens)

    @property
    def output_lengths(self) -> Lengths:
        return _lengths(self.output_tokens)


@dataclass(frozen=True, slots=True)
class Setup:
    """A model, a workload, and settings with which engines run all of its streams at once."""

    model: BenchModel
    workload: Workload
    settings: EngineSettings


def set_up(options: LoadOptions, num_streams: int) -> Setup:
    """Prepare the model and this process's environment for this many streams at once."""
    prompt, output = options.prompt_lengths, options.output_lengths
    model = prepare_model(options)
    prepare(model, options.threads)
    return Setup(
        model,
        Workload(prompt, output, model.vocab_size, options.seed),
        engine_settings(options, model, num_streams, prompt.longest + output.longest),
    )


def engine_settings(
    options: Options, model: BenchModel, num_streams: int, tokens_per_stream: int
) -> EngineSettings:
    """Return settings with which this many streams run in one batch without preemption."""
    if tokens_per_stream > options.max_context:
        raise typer.BadParameter(
            f"prompt and output take up to {tokens_per_stream} tokens, allowed: "
            f"{options.max_context} by --max-context"
        )
    # Room for cache blocks that are partly filled, and for one request of the whole context.
    num_tokens = max(num_streams * (tokens_per_stream + 128), options.max_context + 256)
    return EngineSettings(
        model=model,
        dtype=options.dtype,
        max_context=options.max_context,
        max_num_seqs=max(num_streams, 8),
        kv_cache_bytes=model.kv_cache_bytes(num_tokens, options.dtype),
        compile_layers=options.compile_layers,
        engine_args=options.fathom_engine_args(),
    )


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
