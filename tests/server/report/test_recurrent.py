"""A report of a model without attention, which the elastic engine does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from server.model.source import DEMO_MODEL
from tests.architectures import hf
from tests.fathom_command import fathom_in_process
from tests.server.report.reference import Reference

NUM_LAYERS, HIDDEN, TOKENS, CONTEXT = 4, 32, 256, 64
SECTIONS = ("importance", "single-removal", "depth", "surface", "sublayers", "recurrent")


@pytest.fixture(scope="module", params=["mamba", "rwkv"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights, with the demo model's tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS}
    torch.manual_seed(0)
    model = {
        "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**sizes, state_size=4)),
        "rwkv": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(**sizes, context_length=CONTEXT)),
    }[request.param]()
    directory: Path = tmp_path_factory.mktemp("models") / f"tiny-{request.param}"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_report_of_a_model_without_attention(checkpoint: Path, tmp_path: Path) -> None:
    result = fathom_in_process(
        "report",
        checkpoint,
        tmp_path / "out",
        *(word for name in SECTIONS for word in ("--section", name)),
        *("--calibration-tokens", str(TOKENS), "--quality-tokens", str(TOKENS)),
        FATHOM_MAX_CONTEXT=str(CONTEXT),
        # Else it would be bfloat16 on a processor with instructions for it, unlike the reference.
        FATHOM_DTYPE="float32",
        FATHOM_STATE_DIR=str(tmp_path / "state"),
    )
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    sections = {section["name"]: section for section in document["sections"]}
    status = {name: sections[name]["status"] for name in SECTIONS}
    assert status == {
        "importance": "done",
        "single-removal": "done",
        "depth": "done",
        "surface": "skipped",
        "sublayers": "skipped",
        "recurrent": "done",
    }
    assert "it needs the elastic engine" in sections["surface"]["reason"]
    expected = Reference(checkpoint, CONTEXT).influence(TOKENS)
    layers = sections["importance"]["numbers"]["layers"]
    assert [each["score"] for each in layers] == pytest.approx(expected, rel=1e-4)
    numbers = sections["recurrent"]["numbers"]
    assert numbers["num_layers"] == NUM_LAYERS
    assert numbers["lowest"] == pytest.approx(min(expected), rel=1e-4)
    assert numbers["highest"] == pytest.approx(max(expected), rel=1e-4)
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert f"<h1>Layers of {checkpoint.name}</h1>" in page
    assert page.count("because it needs the elastic engine") == 1
