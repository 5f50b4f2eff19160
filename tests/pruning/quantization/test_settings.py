from __future__ import annotations

import json
from pathlib import Path

import pytest

from pruning.quantization import QuantizationError, QuantizationSettings, check_not_quantized


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits: got 5, allowed: 4, 8"),
        ({"group_size": 0}, "group_size: got 0, allowed: -1, 32, 64, 128"),
        ({"group_size": 48}, "group_size: got 48, allowed: -1, 32, 64, 128"),
    ],
)
def test_values_that_are_not_allowed(settings: dict[str, int], message: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        QuantizationSettings(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_quantized_checkpoints_are_told_apart(tmp_path: Path) -> None:
    def refusal(**config: object) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(QuantizationError) as caught:
            check_not_quantized(tmp_path)
        return str(caught.value)

    (tmp_path / "config.json").write_text('{"model_type": "llama", "text_config": {}}')
    check_not_quantized(tmp_path)
    assert "is quantized already (awq)" in refusal(quantization_config={"quant_method": "awq"})
    nested = {"quantization_config": {"quant_method": "gptq"}}
    assert "is quantized already (gptq)" in refusal(text_config=nested)
    (tmp_path / "quantize_config.json").write_text("{}")
    assert "quantize_config.json" in refusal()
