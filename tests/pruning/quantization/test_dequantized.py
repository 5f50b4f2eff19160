"""Quantized weights unpacked into the model that they were made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning.quantization.dequantized import dequantized_weights, with_dequantized
from pruning.quantization.errors import QuantizationError


def test_the_model_computes_with_them_while_in_context(small: Path, small_quantized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    before = {name: value.clone() for name, value in model.named_parameters()}
    matrices = dequantized_weights(small_quantized)
    assert matrices
    ids = torch.arange(1, 33)[None]
    with torch.inference_mode():
        dense = model(ids).logits
        with with_dequantized(model, small_quantized):
            quantized = model(ids).logits
            for name, value in model.named_parameters():
                matrix = matrices.get(name.removesuffix(".weight"))
                if matrix is None:
                    assert torch.equal(value, before[name]), name
                else:  # near, in steps of a sixteenth of the range of a group
                    assert 0 < (value - before[name]).norm() < 0.3 * before[name].norm(), name
        assert not torch.equal(dense, quantized)
        assert torch.equal(model(ids).logits, dense)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_other_checkpoints_are_refused(small: Path, small_quantized: Path) -> None:
    with pytest.raises(QuantizationError, match="that GPTQ has quantized"):
        dequantized_weights(small)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    with (
        pytest.raises(QuantizationError, match="none of the model's matrices"),
        with_dequantized(model, small_quantized, layers=[0]),
    ):
        pass
