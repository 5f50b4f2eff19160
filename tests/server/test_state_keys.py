"""Every entry is kept under all that it depends on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from server import state_keys
from server.state import StateDirectory
from server.state_keys import Key, Measuring

MEASURING: dict[str, Any] = {
    "model": "m",
    "tokenizer": "t",
    "engine": "elastic",
    "dtype": "float32",
    "max_context": 64,
    "engine_args": {},
}
TEXT: dict[str, Any] = {"text": "text", "num_tokens": 64}
Make = Callable[..., Key]


def measured(make: Make) -> Make:
    def key(**arguments: Any) -> Key:
        measuring = Measuring(**{name: arguments.pop(name) for name in MEASURING})
        return make(measuring, **arguments)

    return key


KINDS: dict[str, tuple[Make, dict[str, Any]]] = {
    "plan": (
        measured(state_keys.plan_key),
        {
            **MEASURING,
            **TEXT,
            "metric": "m",
            "search_tokens": 9,
            "repair": "none",
            "compared_on": {"levels": []},
        },
    ),
    "search": (measured(state_keys.search_key), {**MEASURING, "tokens": "t", "repair": "r"}),
    "transformers plan": (
        state_keys.transformers_plan_key,
        {
            "model": "m",
            "tokenizer": "t",
            "dtype": "float32",
            "max_context": 64,
            "metric": "m",
            **TEXT,
        },
    ),
    "quality": (measured(state_keys.quality_key), {**MEASURING, **TEXT}),
    "probes": (measured(state_keys.probes_key), {**MEASURING, **TEXT}),
    "repair": (measured(state_keys.repair_key), {**MEASURING, **TEXT}),
    "transformers repair": (
        state_keys.transformers_repair_key,
        {"model": "m", "tokenizer": "t", "dtype": "float32", "max_context": 64, **TEXT},
    ),
    "healed": (
        state_keys.healed_key,
        {"model": "m", "skipped": [1, 2], "kind": "gated-mlp"},
    ),
    "speed": (
        measured(state_keys.speed_key),
        {
            **MEASURING,
            **TEXT,
            "hardware": {"num_cpus": 2},
            "versions": {"vllm": "1"},
            "max_num_seqs": 8,
        },
    ),
    "quantized": (
        state_keys.quantized_key,
        {
            "model": "m",
            "bits": 4,
            "group_size": 32,
            "act_order": False,
            "tokens": "t",
            "gptqmodel": "1",
            "with_code": False,
        },
    ),
    "checkpoint": (
        state_keys.checkpoint_key,
        {"model": "m", "removed": [1], "companions": "c", "with_code": False},
    ),
}


def others(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return f"{value}-other"
        case list():
            return [*value, 7]
        case _:
            return {**value, "other": 1}


CASES = [(kind, name) for kind, (_, arguments) in KINDS.items() for name in arguments]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_another_value_makes_another_entry(tmp_path: Path, kind: str, name: str) -> None:
    make, arguments = KINDS[kind]
    state = StateDirectory(tmp_path)
    path = state.path_of(kind, make(**arguments))
    assert state.path_of(kind, make(**arguments)) == path
    changed: Mapping[str, Any] = {**arguments, name: others(arguments[name])}
    assert state.path_of(kind, make(**changed)) != path


def test_companions_are_part_of_a_key() -> None:
    make, arguments = KINDS["quantized"]
    key = make(**arguments)
    assert state_keys.with_companions(key, "a") != state_keys.with_companions(key, "b") != key


def test_every_kind_of_entry_is_described() -> None:
    """The table names every kind of entry in the state directory, with all that it depends on."""
    root = Path(__file__).parents[2] / "server"
    kinds = set()
    for path in root.rglob("*.py"):
        source = path.read_text("utf-8")
        if "StateDirectory" in source and path.name != "state.py":
            kinds |= set(re.findall(r'_KIND = "(\w+)"', source))
            kinds |= set(
                re.findall(r'(?:save|load_or_make|_Table)\w*\(\s*(?:state, )?"(\w+)"', source)
            )
    assert state_keys.__doc__ is not None
    described = set(re.findall(r"^\| ``(\w+)-\*`` \|", state_keys.__doc__, re.MULTILINE))
    expected = {"hash", "plan", "search", "repair", "healed", "healing", "quality", "speed"}
    expected |= {"probes"}
    expected |= {"quantized", "checkpoint"}
    assert kinds == described == expected
