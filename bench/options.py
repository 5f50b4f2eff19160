"""Options of the benchmarks, and the commands that are made from them."""

from __future__ import annotations

import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Chosen = TypeVar("Chosen", bound="Options")


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """The options of all benchmarks; lists are numbers separated by commas."""

    model: str = option("random", "random, demo, smollm2, a checkpoint directory or a Hub id.")
    layers: int = option(24, "Layers of the random model.")
    hidden: int = option(1024, "Hidden size of the random model.")
    intermediate: int = option(2816, "Width of the random model's feed-forward layers.")
    heads: int = option(16, "Attention heads of the random model.")
    kv_heads: int = option(8, "Key and value heads of the random model.")
    vocabulary: int = option(32000, "Tokens that the random model knows.")
    dtype: str = option("float32", "Type of weights and activations: float32, bfloat16, float16.")
    threads: int | None = option(
        None, "Threads of each engine; none: one for a small model, else every core."
    )
    max_context: int = option(512, "Longest prompt and generation together, in tokens.")
    rounds: int = option(5, "How often everything is measured, in turns.")
    max_disturbance: float = option(
        0.1, "Share of the machine that other programs may take before a load is run again."
    )
    seed: int = option(0, "Seed of random weights, prompts and arrivals.")
    compile_layers: bool | None = option(
        None, "Whether Fathom compiles its layers; none: as a server would decide."
    )
    engine_args: str = option(
        "", "More arguments of vLLM's engine for Fathom alone, as a JSON object."
    )
    work_dir: str = option(
        "", "Keeps made and exported checkpoints between runs; none: ~/.cache/fathom/bench."
    )
    output: str = option(
        "", "Directory for results; none: bench-results/ with the benchmark's name and the time."
    )

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "rounds"):
            if getattr(self, name) < 1:
                raise typer.BadParameter(f"--{name.replace('_', '-')}: allowed: 1 or more")

    @property
    def work_directory(self) -> Path:
        if self.work_dir:
            return Path(self.work_dir).absolute()
        cache = os.environ.get("XDG_CACHE_HOME")
        return (Path(cache) if cache else Path.home() / ".cache") / "fathom" / "bench"

    def fathom_engine_args(self) -> dict[str, Any]:
        """Return the arguments in --engine-args; raise typer.BadParameter for no JSON object."""
        try:
            result = json.loads(self.engine_args or "{}")
        except ValueError:
            result = None
        if not isinstance(result, dict):
            raise typer.BadParameter(f"--engine-args: got {self.engine_args!r}, allowed: JSON")
        return result

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def numbers(text: str) -> tuple[int, ...]:
    """Read integers of 1 or more, separated by commas; raise typer.BadParameter for others."""
    try:
        result = tuple(int(part) for part in text.split(","))
    except ValueError:
        result = ()
    if not result or min(result) < 1:
        raise typer.BadParameter(f"got {text!r}, allowed: numbers of 1 or more, as in 1,8,32")
    return result


def names(text: str, flag: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Read names, separated by commas; raise typer.BadParameter for one that is not allowed."""
    result = tuple(text.split(","))
    if unknown := sorted(set(result) - set(allowed)):
        raise typer.BadParameter(f"{flag}: got {unknown[0]!r}, allowed: {', '.join(allowed)}")
    return result


def depths_of(text: str, num_layers: int) -> tuple[int, ...]:
    """Return full depth, which ratios are relative to, and then the given depths.

    Without given depths: three quarters, a half and a quarter of the layers, and one layer.
    """
    if not text:
        given = {max(1, num_layers * quarters // 4) for quarters in (1, 2, 3)} | {1}
    else:
        given = set(numbers(text))
    if max(given) > num_layers:
        raise typer.BadParameter(f"--depths: got {max(given)}, allowed: at most {num_layers}")
    return tuple(sorted(given | {num_layers}, reverse=True))


def pruned_depths(text: str, num_layers: int, defaults: Iterable[int]) -> tuple[int, ...]:
    """Return the given depths, which are below full depth, or without any the ``defaults``."""
    if not text:
        return tuple(dict.fromkeys(defaults))
    depths = numbers(text)
    if max(depths) >= num_layers:
        raise typer.BadParameter(f"--depths: got {max(depths)}, allowed: less than {num_layers}")
    return depths


def command(kind: type[Chosen], run: Callable[..., None]) -> Callable[..., None]:
    """Return a typer command with one flag for each field of ``kind``.

    It calls ``run`` with an object of that kind and with all other arguments of the command.
    """
    names = {each.name for each in fields(kind)}

    def call(**values: Any) -> None:
        others = {name: values.pop(name) for name in values.keys() - names}
        run(kind(**values), **others)

    hints = typing.get_type_hints(kind)
    parameters = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=Annotated[hints[each.name], typer.Option(help=each.metadata["help"])],
        )
        for each in fields(kind)
    ]
    call.__doc__ = inspect.getdoc(sys.modules[run.__module__])
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
