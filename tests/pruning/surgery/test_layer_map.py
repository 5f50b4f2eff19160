from __future__ import annotations

from hypothesis import given

from pruning.surgery.layer_map import LayerMap
from tests.pruning.surgery.layer_maps import layer_maps


@given(layer_maps())
def test_layers_that_stay_are_numbered_in_their_order(layers: LayerMap) -> None:
    kept = [i for i in range(layers.num_layers) if i not in layers.removed]
    assert list(layers.kept) == kept
    assert [layers.new_index(layer) for layer in kept] == list(range(layers.depth))
    assert all(layers.new_index(layer) is None for layer in layers.removed)
    assert layers.new_index(layers.num_layers + 1) == layers.depth + 1
    assert layers.cut(range(layers.num_layers)) == kept
    assert layers.renumber(range(layers.num_layers)) == list(range(layers.depth))
    for layer in range(layers.num_layers + 1):
        assert layers.num_kept_below(layer) == sum(i < layer for i in kept)
