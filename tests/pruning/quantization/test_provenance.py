from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pruning.fingerprint import model_fingerprint
from pruning.plan import PlanError
from pruning.quantization import QUANTIZATION_FILE, Provenance, QuantizationError, plan_of_base
from tests.pruning.surgery.exporting import plan_of

PROVENANCE = Provenance("sha256:base", 4, 64, False, "sha256:text", 7, {"package": "1.0"})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert Provenance.load(tmp_path) is None
    (tmp_path / QUANTIZATION_FILE).write_bytes(PROVENANCE.to_json())
    assert Provenance.load(tmp_path) == PROVENANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version: found 2, allowed: 1"),
        ({"bits": "4"}, "bits: allowed: int"),
        ({"versions": []}, "versions: allowed: dict"),
        ({"more": 1}, "damaged"),
    ],
)
def test_what_is_damaged_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    document = json.loads(PROVENANCE.to_json()) | change
    (tmp_path / QUANTIZATION_FILE).write_text(json.dumps(document))
    with pytest.raises(QuantizationError, match=message):
        Provenance.load(tmp_path)
    (tmp_path / QUANTIZATION_FILE).write_text('{"format_version": 1')
    with pytest.raises(QuantizationError, match="damaged"):
        Provenance.load(tmp_path)


def test_plan_of_the_base_fits_the_quantized_model(small: Path, small_quantized: Path) -> None:
    plan = plan_of(small)
    fingerprint = model_fingerprint(small_quantized)
    with pytest.raises(PlanError):
        plan.check_model(fingerprint, 3)
    fitted = plan_of_base(plan, small_quantized, fingerprint)
    fitted.check_model(fingerprint, 3)
    assert replace(fitted, model_fingerprint=plan.model_fingerprint) == plan
    other = replace(plan, model_fingerprint="sha256:other")
    assert plan_of_base(other, small_quantized, fingerprint) is other
    assert plan_of_base(plan, small, fingerprint) is plan
