from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from pruning.surgery import SurgeryError
from pruning.surgery.layer_map import LayerMap
from pruning.surgery.model_config import cut_config
from tests.pruning.surgery.layer_maps import layer_maps


@given(layer_maps())
def test_whatever_is_kept_per_layer_is_cut(layers: LayerMap) -> None:
    size = layers.num_layers
    config = {
        "n_layer": size,
        "layer_types": [f"kind {i}" for i in range(size)],
        "num_key_value_heads_per_layer": list(range(size)),
        "block_configs": [{"n": i} for i in range(size)],
        "mlp_only_layers": list(range(0, size, 3)),
        "first_k_dense_replace": size // 2,
        "moe_layer_end_index": size - 1,
        "hybrid_override_pattern": "M*-E" * 6 + "M" * size,
        "eos_token_id": list(range(size)),
        "rope_scaling": {"short_factor": list(range(size))},
        "vision_config": {"num_hidden_layers": size, "layer_types": list(range(size))},
    }
    cut = cut_config(config, layers)
    kept = layers.kept
    changed = {
        "n_layer": len(kept),
        "layer_types": [f"kind {i}" for i in kept],
        "num_key_value_heads_per_layer": list(kept),
        "block_configs": [{"n": i} for i in kept],
        "mlp_only_layers": [new for new, old in enumerate(kept) if old % 3 == 0],
        "first_k_dense_replace": sum(i < size // 2 for i in kept),
        "moe_layer_end_index": len(kept) - 1,
    }
    assert cut == config | changed
    nested = cut_config({"text_config": config, "x": 1}, layers)
    assert nested == {"text_config": cut, "x": 1}
    pattern = {"num_layers": size, "hybrid_override_pattern": ("M*-E" * size)[:size]}
    expected = "".join("M*-E"[i % 4] for i in kept)
    assert cut_config(pattern, layers)["hybrid_override_pattern"] == expected


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"model_type": "jamba"}, "attn_layer_period: found 8"),
        ({"model_type": "x", "moe_layer_freq": 2}, "moe_layer_freq: found 2"),
        ({"model_type": "gemma3n_text"}, "num_kv_shared_layers"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_layers_that_depend_on_their_number_are_refused(config: Any, name: str) -> None:
    config = {"num_hidden_layers": 16, **config}
    with pytest.raises(SurgeryError, match=rf"^config\.json: {name}"):
        cut_config(config, LayerMap(16, (3,)))
    assert cut_config(config, LayerMap(16, ())) == config


def test_a_rule_that_still_holds_is_no_obstacle() -> None:
    config = {"num_layers": 6, "moe_layer_freq": 2}
    assert cut_config(config, LayerMap(6, (2, 3))) == {"num_layers": 4, "moe_layer_freq": 2}


def test_numbers_that_json_does_not_have_are_kept() -> None:
    limit = [0.0, {"__float__": "Infinity"}]
    config = {"model_type": "mamba2", "num_hidden_layers": 4, "time_step_limit": limit}
    assert cut_config(config, LayerMap(4, (1,))) == config | {"num_hidden_layers": 3}
