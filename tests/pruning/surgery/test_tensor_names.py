from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.surgery.layer_map import LayerMap
from pruning.surgery.tensor_names import TensorNames
from tests.pruning.surgery.exporting import export, made_up, tensors
from tests.pruning.surgery.layer_maps import layer_maps

CONTAINERS = [
    "model.layers",
    "model.decoder.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "transformer.h",
    "transformer.blocks",
    "transformer.encoder.layers",
    "gpt_neox.layers",
    "backbone.layers",
    "rwkv.blocks",
    "h",
]


@given(layer_maps(), st.sampled_from(CONTAINERS))
def test_tensors_of_layers_are_renamed_and_no_others(layers: LayerMap, container: str) -> None:
    others = {"lm_head.weight", "x.embed_tokens.weight", "vision_tower.layers.0.w", "mtp.fc.weight"}
    others |= {f"model.visual.blocks.{i}.w" for i in range(layers.num_layers)}
    parts = ("mlp.experts.3.up_proj.qweight", "self_attn.q_proj.g_idx")
    names = {f"{container}.{i}.{part}" for i in range(layers.num_layers) for part in parts}
    found = TensorNames.of(names | others, layers.num_layers, tied=True)
    assert (found.container, found.embeddings) == (container, {})
    assert {name: found.renamed(name, layers) for name in others} == {n: n for n in others}
    renamed = {found.renamed(name, layers) for name in names} - {None}
    assert renamed == {f"{container}.{i}.{part}" for i in range(layers.depth) for part in parts}
    for new, old in enumerate(layers.kept):
        expected = f"{container}.{new}.mlp.experts.3.up_proj.qweight"
        assert found.renamed(f"{container}.{old}.mlp.experts.3.up_proj.qweight", layers) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.w"], "tensors: none of model.layers.1, though the configuration says 2"),
        (["lm_head.weight"], "tensors: none is named after a layer, allowed: names such as"),
        (["a.layers.0.w", "a.layers.1.w", "b.h.0.w", "b.h.1.w"], "a.layers and b.h both have 2"),
    ],
)
def test_layers_that_cannot_be_found(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TensorNames.of(names, 2, tied=False)


def test_the_first_layer_keeps_the_norm_of_the_embeddings() -> None:
    names = {f"rwkv.blocks.{i}.ln1.weight" for i in range(3)} | {"rwkv.blocks.0.pre_ln.weight"}
    found = TensorNames.of(names, 3, tied=False)
    layers = LayerMap(3, (0,))
    assert found.renamed("rwkv.blocks.0.pre_ln.weight", layers) == "rwkv.blocks.0.pre_ln.weight"
    assert found.renamed("rwkv.blocks.0.ln1.weight", layers) is None
    assert found.renamed("rwkv.blocks.1.ln1.weight", layers) == "rwkv.blocks.0.ln1.weight"


def test_layers_for_drafting_move_up(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.w" for i in range(5)]
    model = made_up(tmp_path / "model", {name: torch.full((2,), i) for i, name in enumerate(names)})
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    out = export(model, tmp_path / "out", (1, 2))
    values = {name: int(tensor[0]) for name, tensor in tensors(out).items()}
    assert values == {"model.layers.0.w": 0, "model.layers.1.w": 3, "model.layers.2.w": 4}


@pytest.mark.parametrize(
    ("container", "output", "stored"),
    [
        ("model.layers", "lm_head.weight", "model.embed_tokens.weight"),
        ("transformer.h", "lm_head.weight", "transformer.wte.weight"),
        ("gpt_neox.layers", "embed_out.weight", "gpt_neox.embed_in.weight"),
    ],
)
def test_tied_embeddings_are_stored_as_those_of_the_input(
    tmp_path: Path, container: str, output: str, stored: str
) -> None:
    content = {f"{container}.{i}.w": torch.full((2,), i) for i in range(4)}
    source = made_up(tmp_path / "model", {**content, output: torch.arange(6)})
    config = {"num_hidden_layers": 4, "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    new = tensors(export(source, tmp_path / "tied", (1,)))
    assert output not in new
    assert new[stored].equal(torch.arange(6))
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert output in tensors(export(source, tmp_path / "untied", (1,)))
