"""Weights of GPTQ as the matrices that a kernel computes with, for machines without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.checkpoint import read_config, weight_files
from pruning.decoder import find_decoder
from pruning.quantization.errors import QuantizationError

if TYPE_CHECKING:
    import torch
    from torch import nn

_QUANTIZED = ".qweight"
_PACKED_BITS = 32


def dequantized_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return the matrices [out, in] of a checkpoint that is quantized by GPTQ, float32, by name.

    Raises :class:`QuantizationError` for one that is quantized in another way or not at all.
    """
    from safetensors import safe_open

    rules = read_config(directory).get("quantization_config") or {}
    if rules.get("quant_method") != "gptq" or not rules.get("sym", True):
        raise QuantizationError(f"{directory}: allowed: a checkpoint that GPTQ has quantized")
    bits = int(rules["bits"])
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith(_QUANTIZED):
                    module = name.removesuffix(_QUANTIZED)
                    found[module] = _matrix(
                        file.get_tensor(name),
                        file.get_tensor(f"{module}.scales"),
                        file.get_tensor(f"{module}.g_idx"),
                        bits,
                    )
    return found


def _matrix(
    packed: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return the matrix; ``packed`` is int32 [in * bits / 32, out], the lowest bits first."""
    import torch

    shifts = torch.arange(0, _PACKED_BITS, bits)
    values = (packed[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
    integers = values.reshape(-1, packed.shape[1]).float() - 2 ** (bits - 1)
    matrix: torch.Tensor = integers * scales.float()[groups.long()]
    return matrix.T.contiguous()


@contextmanager
def with_dequantized(
    model: nn.Module, directory: Path, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Let ``model`` compute with the quantized weights of the checkpoint, while in context.

    ``layers`` are the model's layers that the checkpoint has, in its order; None: all.

    Raises :class:`QuantizationError` as :func:`dequantized_weights` does, and for a checkpoint
    whose matrices are not the model's.
    """
    import torch

    decoder = find_decoder(model)
    names = {id(module): name for name, module in model.named_modules()}
    prefix, _, _ = names[id(decoder.layers[0])].rpartition(".")
    kept = range(len(decoder.layers)) if layers is None else layers
    weights: dict[str, torch.Tensor] = {}
    for name, matrix in dequantized_weights(directory).items():
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if not name.startswith(f"{prefix}.") or not number.isdecimal() or int(number) >= len(kept):
            raise QuantizationError(f"{directory}: {name} is none of the model's matrices")
        weights[f"{prefix}.{kept[int(number)]}.{rest}.weight"] = matrix
    parameters = dict(model.named_parameters())
    saved: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, matrix in weights.items():
                parameter = parameters.get(name)
                if parameter is None or parameter.shape != matrix.shape:
                    raise QuantizationError(f"{directory}: {name} is none of the model's matrices")
                saved[name] = parameter.detach().clone()
                parameter.copy_(matrix)
        yield
    finally:
        with torch.no_grad():
            for name, before in saved.items():
                parameters[name].copy_(before)
