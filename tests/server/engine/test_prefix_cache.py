"""Salts of the prefix cache: equal for those that may share entries, and for no others."""

from __future__ import annotations

import string
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from server.calls.caller import Caller
from server.engine.base import EVERYONE, CacheNamespace, LayerSelection
from server.engine.prefix_cache import cache_salt

NUM_LAYERS = 16
layer_sets = st.sets(st.integers(0, NUM_LAYERS - 1)).map(lambda layers: tuple(sorted(layers)))
# What looks like a list of layers, another kind of namespace, or a salt; and anything at all.
hostile = st.one_of(
    layer_sets.map(lambda layers: ",".join(map(str, layers))),
    layer_sets.map(lambda layers: f"fathom-{','.join(map(str, layers))}"),
    st.sampled_from(["", "everyone", "client", "address", "alone", "shared", "null", '", "', "[]"]),
    st.builds(
        lambda layers, name: cache_salt(
            LayerSelection(layers, layers), CacheNamespace("client", name)
        ),
        layer_sets,
        st.text(max_size=3),
    ),
    st.text(st.characters(exclude_categories=()), max_size=40),  # lone surrogates, too
)
namespaces = st.one_of(
    st.just(EVERYONE),
    st.builds(CacheNamespace, st.sampled_from(["client", "address"]), hostile),
)
repairs = st.sampled_from([None, "sha256:aa", "sha256:bb"])
selections = st.one_of(
    st.builds(lambda layers, repair: LayerSelection(layers, layers, repair), layer_sets, repairs),
    st.builds(LayerSelection, layer_sets, layer_sets, repairs),
)


@given(selections, namespaces, selections, namespaces)
def test_salts_are_equal_for_the_same_layers_in_the_same_namespace_alone(
    layers: LayerSelection, namespace: CacheNamespace, others: LayerSelection, other: CacheNamespace
) -> None:
    are_uniform = all(each.prefill_skips == each.decode_skips for each in (layers, others))
    # Where no layer is skipped, nothing stands in for one.
    layers, others = (
        each if each.prefill_skips else replace(each, repair=None) for each in (layers, others)
    )
    may_share = are_uniform and (layers, namespace) == (others, other)
    assert (cache_salt(layers, namespace) == cache_salt(others, other)) == may_share


@given(layer_sets, hostile)
def test_the_same_request_again_shares_within_its_namespace(
    layers: tuple[int, ...], name: str
) -> None:
    uniform, namespace = LayerSelection(layers, layers), CacheNamespace("client", name)
    assert cache_salt(uniform, namespace) == cache_salt(uniform, namespace)
    assert cache_salt(uniform, None) != cache_salt(uniform, None), "without a namespace: never"


@given(layer_sets, layer_sets, hostile)
def test_a_request_whose_prompt_runs_other_layers_shares_with_none(
    prefill: tuple[int, ...], decode: tuple[int, ...], name: str
) -> None:
    layers, namespace = LayerSelection(prefill, decode), CacheNamespace("client", name)
    is_shared = cache_salt(layers, namespace) == cache_salt(layers, namespace)
    assert is_shared == (prefill == decode)


@given(selections, namespaces, namespaces, hostile, hostile)
def test_a_salt_of_the_client_splits_a_namespace_and_joins_none(
    layers: LayerSelection, namespace: CacheNamespace, other: CacheNamespace, mine: str, its: str
) -> None:
    is_uniform = layers.prefill_skips == layers.decode_skips
    may_share = is_uniform and (namespace, mine) == (other, its)
    assert (cache_salt(layers, namespace, mine) == cache_salt(layers, other, its)) == may_share


@given(selections, st.one_of(namespaces, st.none()))
def test_no_text_of_a_client_is_in_a_salt(
    layers: LayerSelection, namespace: CacheNamespace | None
) -> None:
    salt = cache_salt(layers, namespace)
    assert len(salt) == 64
    assert set(salt) <= set(string.hexdigits)


def test_callers_have_namespaces_of_their_own() -> None:
    named, address = Caller("10.0.0.1", is_known=True), Caller("10.0.0.1", "10.0.0.1:4711")
    assert named.cache_namespace != address.cache_namespace, "a name is no address"
    assert address.cache_namespace == Caller("10.0.0.1", "10.0.0.1:1").cache_namespace
    assert Caller("a", is_known=True).cache_namespace != Caller("b", is_known=True).cache_namespace
    assert Caller().cache_namespace is None
