"""Maps that are applied as one, and gated MLPs beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pruning.repair import maps_fingerprint, save_gated_mlps
from server.engine.elastic.stand_ins import LinearMap, StandIns, repair
from tests.gated_mlps import random_mlps

SIZE = 8


def maps(num_layers: int, seed: int = 0) -> dict[int, LinearMap]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: LinearMap(0.1 * torch.randn(SIZE, SIZE, generator=generator))
        for layer in range(num_layers)
    }


def test_the_product_does_what_the_maps_do_one_after_the_other() -> None:
    stand_ins = StandIns(4, SIZE)
    by_layer = maps(4)
    stand_ins.put(1, by_layer)
    hidden, residual = torch.randn(3, SIZE), torch.randn(3, SIZE)
    for layers in (range(2, 3), range(1, 3), range(4)):
        one = torch.add(*repair([stand_ins.of(1, layers)], hidden, residual))
        each = torch.add(*repair([by_layer[layer] for layer in layers], hidden, residual))
        torch.testing.assert_close(one, each)


def test_products_are_kept_as_long_as_there_is_room_and_forgotten_with_their_maps() -> None:
    stand_ins = StandIns(3, SIZE)
    stand_ins.put(1, maps(3))
    first = stand_ins.of(1, range(2))
    assert stand_ins.of(1, range(2)) is first
    stand_ins.of(1, range(1, 3))
    stand_ins.of(1, range(3))
    assert stand_ins.of(1, range(2)) is first, "three have room"
    stand_ins.put(1, maps(3, seed=1))
    second = stand_ins.of(1, range(2))
    assert isinstance(first, LinearMap)
    assert isinstance(second, LinearMap)
    assert not torch.equal(second.weight, first.weight)


def test_the_product_that_was_used_longest_ago_makes_room() -> None:
    stand_ins = StandIns(3, SIZE)
    stand_ins.put(1, maps(3))
    pairs = [range(2), range(1, 3), range(3)]
    found = [stand_ins.of(1, layers) for layers in pairs]
    stand_ins.put(2, maps(3, seed=1))  # room for three more
    for number, layers in ((2, range(2)), (2, range(1, 3)), (2, range(3))):
        stand_ins.of(number, layers)
    assert stand_ins.of(1, pairs[0]) is found[0]
    stand_ins.put(2, {})  # its products go, and its room stays
    assert stand_ins.of(1, pairs[1]) is found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlps_are_in_the_place_of_the_first_layers_of_their_runs(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    mlps = random_mlps((0, 1, 3), num_layers=5, hidden_size=SIZE)
    path = tmp_path / "mlps"
    save_gated_mlps(mlps, path)
    stand_ins = StandIns(5, SIZE)
    read = stand_ins.read(path, maps_fingerprint(path), dtype, torch.device("cpu"))
    assert list(read) == [0, 3]
    stand_ins.put(1, read)
    hidden, residual = torch.randn(3, SIZE, dtype=dtype), torch.randn(3, SIZE, dtype=dtype)
    chosen = [stand_ins.of(1, range(1)), stand_ins.of(1, range(3, 4))]
    added, stream = repair(chosen, hidden, residual)
    assert torch.equal(stream, mlps.layers[0](hidden + residual))
    assert torch.equal(added, mlps.layers[3].added(stream))
    assert added.dtype == dtype
