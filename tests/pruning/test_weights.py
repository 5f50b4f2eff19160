"""The weights that are loaded if a directory holds several files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruning.checkpoint import CheckpointError, check_checkpoint
from pruning.transformers_model import load_model
from pruning.weights import INDEX, WEIGHTS, loadable_view, stray_weight_files, weight_files
from tests.pruning.models import generate, load
from tests.pruning.surgery.exporting import export, tensors


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def with_files(directory: Path, *files: str, index: object = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"num_hidden_layers": 1}')
    for number, file in enumerate(files):
        save_file({f"model.layers.0.{number}": torch.tensor([number])}, directory / file)
    if index is not None:
        (directory / INDEX).write_text(json.dumps(index))
    return directory


def indexed(*files: str) -> dict[str, Any]:
    return {"weight_map": {f"model.layers.0.{n}": file for n, file in enumerate(files)}}


def test_without_an_index_all_files_are_loaded_in_natural_order(tmp_path: Path) -> None:
    files = ["model-10.safetensors", "model-2.safetensors", WEIGHTS, ".hidden.safetensors"]
    model = with_files(tmp_path / "model", *files)
    assert names(weight_files(model)) == ["model-2.safetensors", "model-10.safetensors", WEIGHTS]
    assert stray_weight_files(model) == []


def test_with_an_index_those_that_it_names_are_loaded(tmp_path: Path) -> None:
    files = ["a.safetensors", WEIGHTS, "consolidated.safetensors"]
    model = with_files(tmp_path / "model", *files, index=indexed("a.safetensors"))
    assert names(weight_files(model)) == ["a.safetensors"]
    assert names(stray_weight_files(model)) == ["consolidated.safetensors", WEIGHTS]
    # What is not loaded may be anything.
    (model / WEIGHTS).write_bytes(b"?")
    (model / "consolidated.safetensors.index.json").write_text("?")
    check_checkpoint(model)


def test_an_index_that_is_no_file_does_not_count(tmp_path: Path) -> None:
    model = with_files(tmp_path / "model", WEIGHTS)
    (model / INDEX).mkdir()
    assert names(weight_files(model)) == [WEIGHTS]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map: allowed: an object of file names"),
        ({"weight_map": []}, "weight_map: allowed: an object of file names"),
        ({"weight_map": {"a": None}}, "weight_map: allowed: an object of file names"),
        ({"weight_map": {}}, "weight_map: found {}, allowed: the name of a file for each tensor"),
        (indexed("../a.safetensors"), "weight_map: found '../a.safetensors', allowed: names of"),
        (indexed("./a.safetensors"), "weight_map: found './a.safetensors', allowed: names of"),
        (indexed("a.bin"), "weight_map: found 'a.bin', allowed: names of *.safetensors files"),
        (indexed(""), "weight_map: found '', allowed: names of *.safetensors files"),
    ],
)
def test_indices_that_vllm_does_not_follow(tmp_path: Path, index: object, message: str) -> None:
    model = with_files(tmp_path / "model", "a.safetensors", index=index)
    with pytest.raises(CheckpointError, match=re.escape(f"{model / INDEX}: {message}")):
        check_checkpoint(model)


@pytest.fixture
def doubled(stories_model: Path, tmp_path: Path) -> Path:
    """Shards with an index, and a stray file with other weights."""
    directory = tmp_path / "doubled"
    load(stories_model).save_pretrained(directory, max_shard_size="400KB")
    stray = {name: tensor * 0 for name, tensor in load_file(stories_model / WEIGHTS).items()}
    save_file(stray, directory / WEIGHTS, {"format": "pt"})
    return directory


def test_export_has_the_weights_that_are_loaded(
    doubled: Path, stories_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = export(doubled, tmp_path / "out", (1,))
    assert "model.safetensors: left out, model.safetensors.index.json does not name it" in (
        caplog.text
    )
    assert generate(load(out)) == generate(load(export(stories_model, tmp_path / "plain", (1,))))


def test_transformers_is_shown_the_weights_that_are_loaded(
    doubled: Path, stories_model: Path
) -> None:
    with loadable_view(stories_model) as view:
        assert view == stories_model
    with loadable_view(doubled) as view:
        assert view != doubled
        assert (view / "config.json").is_file()
    assert not view.exists()
    expected = generate(load(stories_model))
    assert generate(load_model(doubled, "float32", trust=False).cpu()) == expected


def test_of_a_tensor_in_several_files_the_last_one_counts(
    stories_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = load_file(stories_model / WEIGHTS)
    directory = tmp_path / "twice"
    directory.mkdir()
    (directory / "config.json").write_bytes((stories_model / "config.json").read_bytes())
    zeros = {name: tensor * 0 for name, tensor in content.items()}
    save_file(zeros, directory / "model-9.safetensors", {"format": "pt"})
    save_file(content, directory / "model-10.safetensors", {"format": "pt"})
    out = export(directory, tmp_path / "out", ())
    assert "model-10.safetensors has it, too, and is loaded later" in caplog.text
    exported = tensors(out)
    assert all(torch.equal(exported[name], tensor) for name, tensor in content.items())
    expected = generate(load(stories_model))
    assert generate(load_model(directory, "float32", trust=False).cpu()) == expected
