"""What has been measured of depths, put together and taken apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pruning.probes import Probes
from pruning.quality import Quality
from server.depth.levels import DepthPair
from server.depth.measured import Measured, Speed

DEPTHS = st.builds(DepthPair, st.integers(1, 4), st.integers(1, 4))
MEASURED = st.builds(
    Measured,
    st.dictionaries(
        DEPTHS,
        st.builds(Quality, st.just(10.0), st.just(0.1), st.just(1.0), st.floats(0, 1), st.just(9)),
    ),
    st.dictionaries(DEPTHS, st.builds(Speed, st.floats(1, 9), st.none(), st.just(8))),
    st.dictionaries(DEPTHS, st.just(Probes(None, None))),
)


@given(MEASURED, MEASURED)
def test_of_two_measurements_the_later_counts(earlier: Measured, later: Measured) -> None:
    both = earlier | later
    assert both.qualities == {**earlier.qualities, **later.qualities}
    assert both.speeds == {**earlier.speeds, **later.speeds}
    assert both.probes == {**earlier.probes, **later.probes}


@given(MEASURED, st.sets(DEPTHS))
def test_it_falls_apart_into_depths(measured: Measured, depths: set[DepthPair]) -> None:
    of_these = measured.where(depths.__contains__)
    others = measured.where(lambda pair: pair not in depths)
    assert of_these | others == measured
    for each in (of_these.qualities, of_these.speeds, of_these.probes):
        assert each.keys() <= depths
    for each in (others.qualities, others.speeds, others.probes):
        assert not each.keys() & depths
