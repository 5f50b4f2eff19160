"""The table that the tracker keeps is the one that the model reads."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.engine.elastic import model as elastic_model
from server.engine.elastic.model import ElasticCausalLM
from server.engine.elastic.row_table import RowTable
from server.engine.elastic.row_tracker import RowTracker, row_table


def config() -> Any:
    """Return what the table needs of vLLM's configuration."""
    text = SimpleNamespace(num_hidden_layers=3)
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        model_config=SimpleNamespace(hf_text_config=text),
    )


def model_of(rows: RowTable) -> ElasticCausalLM:
    model = object.__new__(ElasticCausalLM)
    attention = SimpleNamespace(attn=SimpleNamespace(layer_name="attn"))
    model.rows = rows
    model._layers = [(0, SimpleNamespace(self_attn=attention))]
    return model


def real_step() -> Any:
    """Return the forward context of a step, as opposed to one without metadata."""
    return SimpleNamespace(attn_metadata={"attn": SimpleNamespace(elastic_step=object())})


def test_tracker_and_model_of_one_configuration_share_a_table() -> None:
    both, other = config(), config()
    assert both == other, "equal, but not the same"
    tracker = RowTracker(both, torch.device("cpu"), False)
    assert tracker._table is row_table(both) is not row_table(other)
    assert row_table(both).is_tracked
    assert not row_table(other).is_tracked


def test_copied_configuration_ends_the_first_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, every request would run at full depth."""
    monkeypatch.setattr(elastic_model, "get_forward_context", real_step)
    original = config()
    RowTracker(copy.copy(original), torch.device("cpu"), False)
    with pytest.raises(RuntimeError, match="another configuration object"):
        model_of(row_table(original)).forward(None, torch.arange(1))
