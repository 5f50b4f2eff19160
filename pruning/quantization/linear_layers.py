"""The linear layers that are quantized, and the group sizes that fit them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pruning.checkpoint import check_checkpoint, read_config, weight_files
from pruning.quantization.errors import GroupSizeError, QuantizationError
from pruning.quantization.settings import GROUP_SIZES, QuantizationSettings
from pruning.surgery.model_config import num_layers_of
from pruning.surgery.shard import Shard
from pruning.surgery.tensor_names import TensorNames

# vLLM's kernels take numbers of features that are multiples of this.
FEATURES = 32
# Models whose linear layers store [in_features, out_features].
_TRANSPOSED = frozenset({"gpt2", "openai-gpt"})
# Routers of experts stay as they are.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|layer)\.weight$")
# int4 or int8 weights, a 16-bit scale and a zero point for each group.
_SCALE_BITS = 16


class LinearLayer(NamedTuple):
    """The shape of a weight matrix in a decoder layer."""

    name: str
    in_features: int
    out_features: int


def fitting_settings(directory: str | Path, settings: QuantizationSettings) -> QuantizationSettings:
    """Return the settings with a group size, after checking it against the model.

    Reads no weights, only their headers. Raises :class:`QuantizationError` for a group size that
    does not fit and for features that no kernel takes,
    :class:`pruning.checkpoint.CheckpointError` for an incomplete checkpoint and
    :class:`pruning.surgery.SurgeryError` for one whose layers cannot be found.
    """
    layers = linear_layers(Path(directory))
    for layer in layers:
        for name, features in (("in", layer.in_features), ("out", layer.out_features)):
            if features % FEATURES:
                raise QuantizationError(
                    f"{layer.name}: got {features} {name}-features, allowed: multiples of "
                    f"{FEATURES}, which quantized kernels need"
                )
    fitting = [
        size
        for size in GROUP_SIZES
        if size == -1 or all(layer.in_features % size == 0 for layer in layers)
    ]
    if settings.group_size is None:
        return replace(settings, group_size=fitting[0])
    if settings.group_size not in fitting:
        widths = sorted({layer.in_features for layer in layers})
        raise GroupSizeError(
            settings.group_size,
            f"{', '.join(map(str, sorted(fitting)))}, which divide the in-features of this "
            f"model's linear layers ({', '.join(map(str, widths))})",
        )
    return settings


def linear_layers(directory: Path) -> list[LinearLayer]:
    """Return the linear layers of the decoder, by name."""
    check_checkpoint(directory)
    config = read_config(directory)
    shapes = _shapes(directory)
    names = TensorNames.of(shapes.keys(), num_layers_of(config), tied=False)
    transposed = config.get("model_type") in _TRANSPOSED
    layers = []
    for name, shape in sorted(shapes.items()):
        if not name.startswith(f"{names.container}.") or not name.endswith(".weight"):
            continue
        if len(shape) == 2 and not _ROUTER.search(name):
            out_features, in_features = reversed(shape) if transposed else shape
            layers.append(LinearLayer(name, in_features, out_features))
    if not layers:
        raise QuantizationError(f"{directory}: has no linear layers in {names.container}")
    return layers


def num_bytes_quantized(directory: Path, settings: QuantizationSettings) -> int:
    """Estimate the size of the quantized weights; for settings that fit the model."""
    assert settings.group_size is not None
    layers = {layer.name: layer for layer in linear_layers(directory)}
    num_bits = 0
    for path in weight_files(directory):
        for tensor in Shard.read(path).tensors:
            layer = layers.get(tensor.name)
            if layer is None:
                num_bits += 8 * (tensor.end - tensor.start)
                continue
            group_size = layer.in_features if settings.group_size == -1 else settings.group_size
            num_groups = layer.in_features // group_size
            num_bits += layer.out_features * (
                layer.in_features * settings.bits + num_groups * (_SCALE_BITS + settings.bits)
            )
            num_bits += 32 * layer.in_features  # which group each column is in
    return num_bits // 8


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    return {
        tensor.name: tensor.shape
        for path in weight_files(directory)
        for tensor in Shard.read(path).tensors
    }
