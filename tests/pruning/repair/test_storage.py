"""Files of maps and gated MLPs: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pruning.repair import (
    GatedMlp,
    GatedMlps,
    Healing,
    LayerMap,
    RepairError,
    RepairMaps,
    load_maps,
    load_stand_ins,
    maps_fingerprint,
    save_gated_mlps,
    save_maps,
    summarize_maps,
)
from pruning.repair.tensor_file import write_tensors


@pytest.fixture
def maps() -> RepairMaps:
    generator = torch.Generator().manual_seed(0)
    return RepairMaps(
        layers={
            layer: LayerMap(torch.randn(6, 6, generator=generator), 10.0**-layer, 0.25 * layer)
            for layer in (0, 2, 11)
        },
        num_layers=12,
        model_fingerprint="sha256:aa",
        text_fingerprint="sha256:bb",
        num_tokens=1000,
    )


@pytest.fixture
def path(maps: RepairMaps, tmp_path: Path) -> Path:
    path = tmp_path / "repair.safetensors"
    save_maps(maps, path)
    return path


def test_round_trip(maps: RepairMaps, path: Path) -> None:
    loaded = load_maps(path)
    assert loaded.layers.keys() == maps.layers.keys()
    for layer, layer_map in maps.layers.items():
        assert torch.equal(loaded.layers[layer].weight, layer_map.weight)
        assert loaded.layers[layer].ridge == layer_map.ridge
        assert loaded.layers[layer].unexplained == layer_map.unexplained
    assert replace(loaded, layers=maps.layers) == maps
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert (loaded.hidden_size, loaded.num_bytes) == (6, 3 * 36 * 4)


def test_the_header_alone_says_what_the_maps_are(maps: RepairMaps, path: Path) -> None:
    summary = summarize_maps(path)
    assert summary.fingerprint == maps_fingerprint(path)
    assert (summary.num_bytes, summary.num_tokens) == (maps.num_bytes, maps.num_tokens)
    assert summary.unexplained == {layer: 0.25 * layer for layer in (0, 2, 11)}
    assert (summary.healing, summary.healing_kind) == (None, None)


@pytest.mark.parametrize("description", ["[]", "{", '{"format_version": 1}'])
def test_a_description_that_is_none_is_refused(tmp_path: Path, description: str) -> None:
    metadata = {"fathom_repair": description, "sha256": "00"}
    save_file({"layers.0.repair.weight": torch.ones(2, 2)}, tmp_path / "odd", metadata)
    with pytest.raises(RepairError, match="odd: its description is damaged"):
        summarize_maps(tmp_path / "odd")


def test_bfloat16_is_kept_as_it_is(maps: RepairMaps, tmp_path: Path) -> None:
    narrow = LayerMap(maps.layers[0].weight.bfloat16(), 1.0, 0.5)
    save_maps(replace(maps, layers={0: narrow}), tmp_path / "narrow")
    loaded = load_maps(tmp_path / "narrow")
    assert torch.equal(loaded.layers[0].weight, narrow.weight)
    assert loaded.layers[0].weight.dtype == torch.bfloat16


def test_every_truncation_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(RepairError, match=re.escape(str(path))):
            load_maps(path)


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for offset in range(0, len(data), 5):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(RepairError, match=re.escape(str(path))):
            load_maps(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, 2)}, other)
    with pytest.raises(RepairError, match=f"{re.escape(str(other))}: not a file of repair maps"):
        load_maps(other)
    other.write_text("no safetensors at all, though long enough")
    with pytest.raises(RepairError, match=f"{re.escape(str(other))}: not a safetensors file"):
        load_maps(other)
    with pytest.raises(FileNotFoundError):
        load_maps(tmp_path / "absent")


def test_another_format_is_refused(
    maps: RepairMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr("pruning.repair.storage.FORMAT_VERSION", 3)
        save_maps(maps, tmp_path / "later")
    with pytest.raises(RepairError, match="later: format_version: found 3, allowed: 1, 2"):
        load_maps(tmp_path / "later")


def test_the_first_format_is_read(maps: RepairMaps, tmp_path: Path) -> None:
    """It had no ``kind``."""
    description = {
        "format_version": 1,
        "num_layers": 12,
        "model_fingerprint": "sha256:aa",
        "text_fingerprint": "sha256:bb",
        "num_tokens": 1000,
        "layers": {
            str(layer): {"ridge": m.ridge, "unexplained": m.unexplained}
            for layer, m in maps.layers.items()
        },
    }
    tensors = {f"layers.{layer}.repair.weight": m.weight for layer, m in maps.layers.items()}
    path = tmp_path / "first"
    path.write_bytes(write_tensors("fathom_repair", json.dumps(description), tensors))
    loaded = load_maps(path)
    assert loaded.healing is None
    assert replace(loaded, layers=maps.layers) == maps
    for layer, layer_map in maps.layers.items():
        assert torch.equal(loaded.layers[layer].weight, layer_map.weight)


def test_healed_maps_say_how_they_were_trained(maps: RepairMaps, tmp_path: Path) -> None:
    healing = Healing((0, 2, 11), "sha256:closed", 120, 80, 7, 0.5, 0.25)
    healed = replace(maps, healing=healing)
    save_maps(healed, tmp_path / "healed")
    assert load_maps(tmp_path / "healed").healing == healing
    summary = summarize_maps(tmp_path / "healed")
    assert (summary.healing, summary.healing_kind) == (healing, "maps")
    save_maps(replace(healed, healing=replace(healing, started_from=None)), tmp_path / "healed")
    assert load_maps(tmp_path / "healed").healing == replace(healing, started_from=None)


def test_maps_of_another_model_are_refused(maps: RepairMaps) -> None:
    maps.check_model("sha256:aa", 12, 6)
    with pytest.raises(
        RepairError, match="num_layers: the maps are of a model with 12, allowed: 8"
    ):
        maps.check_model("sha256:aa", 8, 6)
    with pytest.raises(RepairError, match="hidden_size: the maps are of a model with 6, allowed"):
        maps.check_model("sha256:aa", 12, 8)
    with pytest.raises(RepairError, match="model_fingerprint: the maps are of a model with sha256"):
        maps.check_model("sha256:cc", 12, 6)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "layers: got none"),
        ({12: torch.ones(2, 2)}, "layers: got layer 12, allowed: 0 to 11"),
        ({1: torch.ones(2, 3)}, "layer 1: got a map of shape [2, 3], allowed: [hidden, hidden]"),
        ({1: torch.ones(2, 2), 2: torch.ones(3, 3)}, "layer 1: got a map of shape [2, 2]"),
        ({1: torch.tensor([[1, math.nan], [0, 0]])}, "layer 1: its map holds a NaN or an infinity"),
    ],
)
def test_what_makes_no_maps_is_refused(
    maps: RepairMaps, layers: dict[int, torch.Tensor], message: str
) -> None:
    with pytest.raises(RepairError, match=re.escape(message)):
        replace(maps, layers={i: LayerMap(weight, 1.0, 0.5) for i, weight in layers.items()})


@pytest.fixture
def mlps() -> GatedMlps:
    generator = torch.Generator().manual_seed(0)
    return GatedMlps(
        layers={first: GatedMlp(torch.randn(3, 5, 6, generator=generator)) for first in (1, 4, 11)},
        num_layers=12,
        model_fingerprint="sha256:aa",
        text_fingerprint="sha256:bb",
        num_tokens=1000,
        healing=Healing((1, 2, 4, 11), None, 120, 80, 7, 0.5, 0.25),
    )


@pytest.fixture
def mlps_path(mlps: GatedMlps, tmp_path: Path) -> Path:
    path = tmp_path / "mlps.safetensors"
    save_gated_mlps(mlps, path)
    return path


def test_round_trip_of_mlps(mlps: GatedMlps, mlps_path: Path) -> None:
    loaded = load_stand_ins(mlps_path)
    assert isinstance(loaded, GatedMlps)
    assert loaded.layers.keys() == mlps.layers.keys()
    for first, mlp in mlps.layers.items():
        assert torch.equal(loaded.layers[first].weight, mlp.weight)
    assert replace(loaded, layers=mlps.layers) == mlps
    assert loaded.runs == [(1, 2), (4,), (11,)]
    assert (loaded.intermediate_size, loaded.hidden_size) == (5, 6)
    summary = summarize_maps(mlps_path)
    assert summary.fingerprint == maps_fingerprint(mlps_path)
    assert (summary.num_bytes, summary.num_tokens) == (4 * mlps.num_parameters, 1000)
    assert summary.unexplained == {}
    assert (summary.healing, summary.healing_kind) == (mlps.healing, "gated-mlp")


def test_the_header_of_a_file_of_mlps_says_what_is_in_it(mlps_path: Path) -> None:
    with safe_open(mlps_path, "pt") as file:
        description = json.loads(file.metadata()["fathom_repair"])
        names = set(file.keys())
    assert (description["kind"], description["intermediate_size"]) == ("gated-mlp", 5)
    assert (description["runs"], description["healing"]["skipped"]) == (
        [[1, 2], [4], [11]],
        [1, 2, 4, 11],
    )
    assert names == {f"layers.{first}.gated_mlp.weight" for first in (1, 4, 11)}


def test_maps_are_told_from_mlps(path: Path, mlps_path: Path) -> None:
    assert isinstance(load_stand_ins(path), RepairMaps)
    with pytest.raises(
        RepairError,
        match=r"mlps\.safetensors: kind: found 'gated-mlp', allowed: closed-form, healed",
    ):
        load_maps(mlps_path)


def test_other_weights_have_another_fingerprint(mlps: GatedMlps, mlps_path: Path) -> None:
    before = maps_fingerprint(mlps_path)
    mlps.layers[4].weight[1, 2, 3] += 1
    save_gated_mlps(mlps, mlps_path)
    assert maps_fingerprint(mlps_path) != before


def test_every_truncation_and_every_flipped_bit_of_mlps_is_refused(mlps_path: Path) -> None:
    data = mlps_path.read_bytes()
    damaged = [data[:length] for length in range(0, len(data), 11)]
    for offset in range(0, len(data), 7):
        damaged.append(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
    for content in damaged:
        mlps_path.write_bytes(content)
        with pytest.raises(RepairError, match=re.escape(str(mlps_path))):
            load_stand_ins(mlps_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"intermediate_size": 6}, "its description is damaged: it is not that of its MLPs"),
        ({"runs": [[1], [4], [11]]}, "its description is damaged: it is not that of its MLPs"),
        ({"runs": [[1, 2], [4]]}, "runs: got MLPs of the layers [1, 4], allowed: [1, 4, 11]"),
        ({"runs": [[1, 2], [5], [11]]}, "its description is damaged: KeyError"),
        ({"runs": 3}, "its description is damaged: TypeError"),
        ({"healing": {}}, "its description is damaged: KeyError"),
        ({"kind": "lora"}, "kind: found 'lora', allowed: closed-form, healed, gated-mlp"),
        ({"kind": "healed"}, "its description is damaged: KeyError('layers')"),
        ({"format_version": 3}, "format_version: found 3, allowed: 1, 2"),
    ],
)
def test_a_description_that_is_not_that_of_the_mlps_is_refused(
    mlps_path: Path, changes: dict[str, object], problem: str
) -> None:
    with safe_open(mlps_path, "pt") as file:
        description = json.loads(file.metadata()["fathom_repair"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = write_tensors("fathom_repair", json.dumps(description | changes), tensors)
    mlps_path.write_bytes(content)
    with pytest.raises(RepairError, match=re.escape(f"{mlps_path}: {problem}")):
        load_stand_ins(mlps_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": {}}, "runs: got MLPs of the layers [], allowed: [1, 4, 11], the first of"),
        ({"num_layers": 11}, "healing.skipped: got layer 11, allowed: 0 to 10"),
        ({"num_tokens": 0}, "num_tokens: got 0, allowed: 1 or more"),
        ({"weight": torch.ones(2, 5, 6)}, "layer 1: got an MLP of shape [2, 5, 6], allowed: [3, "),
        ({"weight": torch.ones(3, 0, 6)}, "layer 1: got an MLP of shape [3, 0, 6], allowed: [3, "),
        ({"weight": torch.ones(3, 4, 6)}, "layer 1: got an MLP of shape [3, 4, 6], allowed: [3, "),
        ({"weight": torch.full((3, 5, 6), math.inf)}, "layer 1: its MLP holds a NaN or an"),
    ],
)
def test_what_makes_no_mlps_is_refused(
    mlps: GatedMlps, changes: dict[str, Any], problem: str
) -> None:
    if "weight" in changes:
        changes = {"layers": {**mlps.layers, 1: GatedMlp(changes["weight"])}}
    with pytest.raises(RepairError, match=re.escape(problem)):
        replace(mlps, **changes)


def test_mlps_of_another_model_are_refused(mlps: GatedMlps) -> None:
    mlps.check_model("sha256:aa", 12, 6)
    with pytest.raises(RepairError, match="num_layers: the MLPs are of a model with 12, allowed"):
        mlps.check_model("sha256:aa", 8, 6)
    with pytest.raises(RepairError, match="model_fingerprint: the MLPs are of a model with sha"):
        mlps.check_model("sha256:cc", 12, 6)
