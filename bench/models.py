"""The measured model, and its checkpoints of single depths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from bench.options import Options
from bench.random_model import RandomModel
from pruning.checkpoint import read_config
from pruning.fingerprint import model_fingerprint
from pruning.plan import Plan
from pruning.surgery import export_checkpoint
from server.engine.base import LayerSelection
from server.errors import InvalidArgument
from server.model.source import find_model

_MIB = 1 << 20
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A checkpoint, with the plan that every engine of a comparison follows."""

    name: str
    directory: Path
    config: dict[str, Any]
    plan: Plan
    plan_file: Path
    work_dir: Path

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    def describe(self, dtype: str) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_layers": self.num_layers,
            "hidden_size": self.config["hidden_size"],
            "intermediate_size": self.config["intermediate_size"],
            "num_heads": self.config["num_attention_heads"],
            "num_kv_heads": self.config["num_key_value_heads"],
            "vocab_size": self.vocab_size,
            "dtype": dtype,
        }

    def selection(self, depth: int | None) -> LayerSelection:
        """Return the layers to skip at ``depth``; None is full depth."""
        skipped = tuple(sorted(self.plan.skipped(self.num_layers if depth is None else depth)))
        return LayerSelection(skipped, skipped)

    def exported(self, depth: int) -> Path:
        """Return a standalone checkpoint of ``depth``, and make it if there is none yet."""
        if depth == self.num_layers:
            return self.directory
        out = self.work_dir / f"{self.plan_file.stem}-depth-{depth}"
        if not out.is_dir():
            export_checkpoint(self.directory, out, self.plan, depth)
        return out

    def kv_cache_bytes(self, num_tokens: int, dtype: str) -> int:
        """Return the memory for the keys and values of ``num_tokens`` tokens, and a little more."""
        heads = self.config["num_key_value_heads"]
        head_dim = self.config.get("head_dim") or (
            self.config["hidden_size"] // self.config["num_attention_heads"]
        )
        per_token = 2 * self.num_layers * heads * head_dim * _DTYPE_BYTES[dtype]
        return (int(1.1 * num_tokens * per_token) // _MIB + 8) * _MIB


def prepare_model(options: Options) -> BenchModel:
    """Return the model that the options name; a random one is made."""
    if options.dtype not in _DTYPE_BYTES:
        raise typer.BadParameter(f"--dtype: allowed: {', '.join(_DTYPE_BYTES)}")
    work_dir = options.work_directory
    match options.model:
        case "random":
            try:
                made = RandomModel(
                    num_layers=options.layers,
                    hidden_size=options.hidden,
                    intermediate_size=options.intermediate,
                    num_heads=options.heads,
                    num_kv_heads=options.kv_heads,
                    vocab_size=options.vocabulary,
                    dtype=options.dtype,
                    seed=options.seed,
                )
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            name, directory = made.name, made.save(work_dir)
        case given:
            try:
                source = find_model(given)
            except InvalidArgument as error:
                raise typer.BadParameter(f"--{error}") from None
            if not (source.directory / "config.json").is_file():
                allowed = "a directory with a checkpoint"
                raise typer.BadParameter(f"--model: got {given!r}, allowed: {allowed}")
            name, directory = source.title, source.directory
    config = read_config(directory)
    fingerprint = model_fingerprint(directory)
    plan = positional_plan(config["num_hidden_layers"], fingerprint)
    work_dir.mkdir(parents=True, exist_ok=True)
    plan_file = work_dir / f"plan-{fingerprint.rpartition(':')[2][:16]}.json"
    if not plan_file.is_file():
        plan.save(plan_file)
    return BenchModel(name, directory, config, Plan.load(plan_file), plan_file, work_dir)


def positional_plan(num_layers: int, fingerprint: str) -> Plan:
    """Return a plan that removes the layers before the last one first, from deep to shallow.

    Speed depends only on how many layers are skipped and on whether they are adjacent. They are
    adjacent in models that were measured: influence is lowest in the deeper middle.
    """
    last = num_layers - 1
    order: Sequence[int] = [*range(last - 1, -1, -1), last]
    scores = [0.0] * num_layers
    for rank, layer in enumerate(order):
        scores[layer] = (rank + 1) / num_layers
    return Plan(
        removal_order=tuple(order),
        scores=tuple(scores),
        stderrs=(0.0,) * num_layers,
        model_fingerprint=fingerprint,
        text_fingerprint="none: by position",
        num_tokens=1,
        versions={},
        created_at=time.time(),
    )
