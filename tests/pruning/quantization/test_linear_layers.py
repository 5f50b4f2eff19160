from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pruning.quantization import (
    GroupSizeError,
    QuantizationError,
    QuantizationSettings,
    fitting_settings,
)
from pruning.quantization.linear_layers import linear_layers, num_bytes_quantized


def model_of(directory: Path, shapes: Mapping[str, tuple[int, ...]], **config: object) -> Path:
    """A checkpoint of one layer with tensors of these shapes."""
    directory.mkdir(exist_ok=True)
    tensors = {f"model.layers.0.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    save_file(
        {"model.embed_tokens.weight": torch.zeros(7, 5), **tensors}, directory / "m.safetensors"
    )
    document = {"model_type": "llama", "num_hidden_layers": 1, **config}
    (directory / "config.json").write_text(json.dumps(document))
    return directory


WIDTHS = st.lists(st.integers(1, 12).map(lambda n: 32 * n), min_size=1, max_size=4)


@given(WIDTHS, st.sampled_from([None, -1, 32, 64, 128]))
def test_groups_divide_every_width(
    tmp_path_factory: pytest.TempPathFactory, widths: list[int], wanted: int | None
) -> None:
    shapes = {f"{i}.weight": (32, width) for i, width in enumerate(widths)}
    model = model_of(tmp_path_factory.mktemp("model"), shapes)
    fitting = [size for size in (128, 64, 32) if all(width % size == 0 for width in widths)]
    if wanted is None:
        assert fitting_settings(model, QuantizationSettings()).group_size == fitting[0]
    elif wanted in (*fitting, -1):
        assert fitting_settings(model, QuantizationSettings(group_size=wanted)).group_size == wanted
    else:
        with pytest.raises(GroupSizeError) as caught:
            fitting_settings(model, QuantizationSettings(group_size=wanted))
        allowed = ", ".join(map(str, sorted([-1, *fitting])))
        assert f"group_size: got {wanted}, allowed: {allowed}, which" in str(caught.value)


def test_only_matrices_of_layers_are_quantized(tmp_path: Path) -> None:
    shapes = {
        "mlp.up_proj.weight": (96, 64),
        "mlp.gate_proj.weight": (96, 64),
        "mlp.gate.weight": (8, 64),  # a router
        "input_layernorm.weight": (64,),
        "mixer.conv1d.weight": (64, 1, 4),
        "mlp.up_proj.bias": (96,),
    }
    names = [layer.name for layer in linear_layers(model_of(tmp_path, shapes))]
    assert names == ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]


def test_gpt2_stores_its_matrices_the_other_way(tmp_path: Path) -> None:
    shapes = {"attn.c_attn.weight": (64, 192)}
    (layer,) = linear_layers(model_of(tmp_path, shapes, model_type="gpt2"))
    assert (layer.in_features, layer.out_features) == (64, 192)


def test_features_that_no_kernel_takes(stories_model: Path, tmp_path: Path) -> None:
    expected = r"down_proj\.weight: got 172 in-features, allowed: multiples of 32"
    with pytest.raises(QuantizationError, match=expected):
        fitting_settings(stories_model, QuantizationSettings(group_size=32))
    with pytest.raises(QuantizationError, match="got 100 out-features"):
        fitting_settings(
            model_of(tmp_path, {"q.weight": (100, 64)}), QuantizationSettings(group_size=-1)
        )


def test_size_is_foreseen(small: Path, small_quantized: Path) -> None:
    settings = fitting_settings(small, QuantizationSettings())
    (weights,) = small_quantized.glob("*.safetensors")
    assert num_bytes_quantized(small, settings) == pytest.approx(weights.stat().st_size, rel=0.02)
