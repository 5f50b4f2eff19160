"""Fingerprints see every change that matters, and no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.checkpoint import CheckpointError
from pruning.fingerprint import (
    files_fingerprint,
    model_fingerprint,
    token_fingerprint,
    tokenizer_fingerprint,
)
from server.model.source import DEMO_MODEL


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, directory, ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    return directory


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.999])
def test_one_bit_anywhere_in_the_weights_counts(model: Path, share: float) -> None:
    before = model_fingerprint(model)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[int(len(content) * share)] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(model) != before


def test_what_is_not_loaded_does_not_count(model: Path) -> None:
    before = model_fingerprint(model)
    for name in ("pytorch_model.bin", "modeling.py", "chat_template.jinja", "LICENSE"):
        (model / name).write_text("changed")
    assert model_fingerprint(model) == before
    index = {"weight_map": dict.fromkeys(["a", "b"], "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "other.safetensors").write_bytes(b"?")
    assert model_fingerprint(model) == before


def test_code_counts_where_the_configuration_names_it(model: Path) -> None:
    config = json.loads((model / "config.json").read_bytes())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling.py").write_text("one")
    before = model_fingerprint(model)
    (model / "modeling.py").write_text("two")
    assert model_fingerprint(model) != before


def test_hashes_may_be_remembered(model: Path) -> None:
    asked: list[str] = []

    def known(path: Path) -> str:
        asked.append(path.name)
        return "hash"

    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert model_fingerprint(model, known) != model_fingerprint(model)
    assert asked == ["weights.safetensors"]


CHANGES = {
    "tokenizer.json": '{"changed": true}',
    "tokenizer.model": "changed",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "special_tokens_map.json": '{"bos_token": "<s>"}',
    "added_tokens.json": '{"<x>": 1}',
    "qwen.tiktoken": "changed",
    "tokenizer_config.json": '{"add_bos_token": true}',
}


@pytest.mark.parametrize(("name", "content"), CHANGES.items())
def test_every_file_of_a_tokenizer_counts(model: Path, name: str, content: str) -> None:
    before = tokenizer_fingerprint(model)
    (model / name).write_text(content)
    assert tokenizer_fingerprint(model) != before


def test_chat_templates_do_not_make_another_tokenizer(model: Path) -> None:
    before = tokenizer_fingerprint(model)
    config = json.loads((model / "tokenizer_config.json").read_bytes())
    config["chat_template"] = "{{ messages }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    (model / "chat_template.jinja").write_text("changed")
    (model / "generation_config.json").write_text("{}")
    assert tokenizer_fingerprint(model) == before


def test_a_tokenizer_with_code(model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["t.T", null]}}')
    before = tokenizer_fingerprint(model)
    (model / "t.py").write_text("code")
    assert tokenizer_fingerprint(model) != before


def test_what_cannot_be_read_is_named(model: Path) -> None:
    def refuse(path: Path) -> str:
        raise OSError(5, "Input/output error")

    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Input/output"):
        model_fingerprint(model, refuse)
    (model / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: allowed: a JSON object"):
        tokenizer_fingerprint(model)


windows = st.lists(st.lists(st.integers(0, 2000)))


@given(windows, windows)
def test_windows_of_tokens_are_told_apart(one: list[list[int]], other: list[list[int]]) -> None:
    assert (token_fingerprint(one) == token_fingerprint(other)) == (one == other)


def test_files_are_told_apart_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    pairs = [("a", tmp_path / "a"), ("b", tmp_path / "b")]
    swapped = [("a", tmp_path / "b"), ("b", tmp_path / "a")]
    assert files_fingerprint(pairs) != files_fingerprint(swapped)
    with pytest.raises(CheckpointError, match="cannot be read"):
        files_fingerprint([("c", tmp_path / "c")])
