from __future__ import annotations

from hypothesis import strategies as st

from pruning.surgery.layer_map import LayerMap


@st.composite
def layer_maps(draw: st.DrawFn) -> LayerMap:
    num_layers = draw(st.integers(1, 24))
    removed = draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers - 1))
    return LayerMap(num_layers, tuple(sorted(removed)))
