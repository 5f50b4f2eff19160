from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.surgery import SurgeryError
from pruning.surgery.layer_map import LayerMap
from pruning.surgery.module_rules import renumber_rules
from tests.pruning.surgery.layer_maps import layer_maps

MODULES = ("self_attn.q_proj", "mlp.experts.1.up_proj", "mlp.experts.2.down_proj")


def first_match(rules: dict[str, int], name: str) -> int | None:
    """What GPTQModel's ``dynamic`` says of a module: the first rule that matches."""
    return next((v for rule, v in rules.items() if re.match(rule[2:], name)), None)


@st.composite
def dynamic_rules(draw: st.DrawFn, num_layers: int) -> dict[str, int]:
    layer = st.integers(0, num_layers - 1).map(str)
    number = st.one_of(
        layer,
        st.lists(layer, min_size=1, max_size=4).map(lambda items: f"({'|'.join(items)})"),
        st.sampled_from(
            [r"\d+", "[0-9]", "[2-5]", "1[0-9]", ".*", "[0-9]+", "1?[13579]", "1.*", "(?:[12]|3)"]
        ),
    )
    head = st.sampled_from(
        [r".*\.layers\.", r".*[.]layers[.]", r"model\.layers\.", r"^model.layers.", r".*layers\."]
    )
    tail = st.sampled_from([r"\..*", r"\.mlp\..*", r"\..*down_proj$", ".mlp", ".*experts.1.*"])
    rule = st.builds("{}{}{}{}".format, st.sampled_from(["-:", "+:"]), head, number, tail)
    rules = draw(st.lists(st.one_of(rule, st.just(r"+:.*\.q_proj")), max_size=4, unique=True))
    return {rule: value for value, rule in enumerate(rules)}


@given(st.data(), layer_maps())
def test_rules_mean_the_same_for_every_module(data: st.DataObject, layers: LayerMap) -> None:
    rules = data.draw(dynamic_rules(layers.num_layers))
    renumbered = renumber_rules({"bits": 4, "dynamic": rules}, "layers", layers)["dynamic"]
    for new, old in enumerate(layers.kept):
        for module in MODULES:
            before = first_match(rules, f"model.layers.{old}.{module}")
            after = first_match(renumbered, f"model.layers.{new}.{module}")
            assert before == after, (rules, renumbered, old, module)


def test_lists_of_modules_are_renumbered() -> None:
    rules: Any = {
        "bits": 4,
        "modules_to_not_convert": ["lm_head", "model.layers.3.mlp", "model.layers.2"],
        "ignore": ["re:.*layers.1.*", "model.layers.1.mlp.gate"],
        "extra_config": {"model.layers.1.mlp": {"bits": 8}, "model.layers.3.mlp": {"bits": 2}},
        "group_size": [128, "model.layers.2.x"],
    }
    assert renumber_rules(rules, "layers", LayerMap(4, (1,))) == {
        "bits": 4,
        "modules_to_not_convert": ["lm_head", "model.layers.2.mlp", "model.layers.1"],
        "ignore": [],
        "extra_config": {"model.layers.2.mlp": {"bits": 2}},
        "group_size": [128, "model.layers.1.x"],
    }


def test_rule_whose_layers_cannot_be_told_is_refused() -> None:
    rule = r"-:layers\.(1\.mlp|2\.self_attn)\.x"
    with pytest.raises(SurgeryError, match=r"quantization_config: found .*1\\\\.mlp.*, allowed:"):
        renumber_rules({"dynamic": {rule: {}}}, "layers", LayerMap(4, (1,)))
