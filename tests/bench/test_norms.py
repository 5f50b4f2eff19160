"""``fathom bench norms``: two tiny models that differ in where their norms are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from bench.cli import run
from bench.norms import NormsOptions, paragraph
from bench.tiny_model import TinyModel, look

TINY = ("--layers", "3", "--hidden", "32", "--intermediate", "64", "--heads", "2", "--threads", "1")


def test_the_cosines_over_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    size = ("--steps", "4", "--batch-size", "4", "--window", "16", "--looks", "2")
    with pytest.raises(SystemExit) as raised:
        run(["norms", *TINY, *size, "--output", str(out)])
    assert raised.value.code == 0
    report = json.loads((out / "norms.json").read_text())
    assert [(row["norm"], row["step"]) for row in report["rounds"]] == [
        (norm, step) for norm in ("pre-norm", "post-norm") for step in (0, 2, 4)
    ]
    for row in report["rounds"]:
        assert len(row["cosines"]) == 3
        assert all(-1 <= cosine <= 1 for cosine in row["cosines"])
    pre, post = report["summary"]
    for row, last in ((pre, report["rounds"][2]), (post, report["rounds"][5])):
        assert row["median_cosine"] == sorted(last["cosines"])[1]
        assert row["most_redundant"] == last["cosines"].index(max(last["cosines"]))
        assert row["loss_added"] == pytest.approx(last["loss_without"] - last["loss"])
    assert report["notes"][0] == paragraph(report["summary"], 4)
    largest = max(pre["median_cosine"], post["median_cosine"])
    assert f"at a cosine of {largest:.3f}" in report["notes"][0]
    assert (out / "norms.svg").stat().st_size
    assert (out / "norms.png").stat().st_size
    assert "After 4 steps from one seed" in capsys.readouterr().out


@pytest.mark.parametrize("pre_norm", [True, False])
def test_both_models_have_the_same_weights_and_the_norms_where_they_belong(pre_norm: bool) -> None:
    """The streams are those of a computation by hand."""
    options = NormsOptions(layers=2, hidden=32, intermediate=64, heads=2, window=8)
    models = []
    for each in (True, False):
        torch.manual_seed(0)
        models.append(TinyModel(options, 50, pre_norm=each))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    model = models[0 if pre_norm else 1].double()
    windows = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(1))
    streams = model.streams(windows[:, :-1])
    layer: Any = model.layers[1]
    before = streams[1]
    mask = torch.full((8, 8), -torch.inf, dtype=torch.float64).triu(1)

    def attention(states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = layer.self_attn(states, states, states, attn_mask=mask)[0]
        return found

    def mlp(states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = layer.linear2(functional.gelu(layer.linear1(states)))
        return found

    if pre_norm:
        middle = before + attention(layer.norm1(before))
        expected = middle + mlp(layer.norm2(middle))
    else:
        middle = layer.norm1(before + attention(before))
        expected = layer.norm2(middle + mlp(middle))
    torch.testing.assert_close(streams[2], expected)
    cosine = (before * expected).sum(-1) / (before.norm(dim=-1) * expected.norm(dim=-1))
    assert look(model, windows)["cosines"][1] == pytest.approx(float(cosine.mean().detach()))
    assert torch.equal(model.streams(windows[:, :-1], skipped=1)[2], streams[1])


def test_the_paragraph_follows_the_numbers() -> None:
    """Whichever model leaves its stream more as it was is the one that is named first."""
    row = {
        "layers": 8,
        "median_cosine_at_first": 0.5,
        "layers_nearly_unchanged": 2,
        "loss": 3.25,
    }
    pre = {**row, "norm": "pre-norm", "median_cosine": 0.75, "loss_added": 0.5}
    post = {**row, "norm": "post-norm", "median_cosine": 0.875, "loss_added": 0.25}
    text = paragraph([pre, post], 7)
    assert "the median layer of the post-norm model leaves the stream at a cosine of 0.875" in text
    assert "adds 0.250 nats to the post-norm model and 0.500 to the pre-norm one" in text
    swapped = paragraph([pre | {"median_cosine": 0.9375, "loss_added": 0.125}, post], 7)
    assert (
        "the median layer of the pre-norm model leaves the stream at a cosine of 0.938" in swapped
    )
    assert "adds 0.125 nats to the pre-norm model and 0.250 to the post-norm one" in swapped
