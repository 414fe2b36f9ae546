"""A memory that its units and the host's processor share: turns, banks of their own, power."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis import InputError
from hwmodels.pim import Pim, at_once, host_bandwidth, in_turns, load_pim, sustained_bandwidth

HBM_PIM = Pim(load_pim("hbm-pim"), "pim")
DUPLEX = Pim(load_pim("duplex"), "pim", 5)


def test_turns_by_hand() -> None:
    """60 % of 100 us for the units, 2 us for each change: 58 us of theirs, 38 us of the host's."""
    shared = in_turns(HBM_PIM, share=0.6, period=100e-6, change=2e-6)
    assert shared.units == pytest.approx(0.58 * sustained_bandwidth(HBM_PIM))
    assert shared.host == pytest.approx(0.38 * 307.2e9)


def test_one_side_alone_changes_nothing() -> None:
    alone = in_turns(HBM_PIM, share=1, period=1e-3, change=1e-4)
    assert (alone.host, alone.units) == (0, sustained_bandwidth(HBM_PIM))
    none = in_turns(HBM_PIM, share=0, period=1e-3, change=1e-4)
    assert (none.host, none.units) == (host_bandwidth(HBM_PIM), 0)


def test_a_bundle_of_banks_by_itself_shows_its_rows() -> None:
    """Duplex with one of four bundles: 31 x 4 + 8 + 19 + 19 clocks a row of 128; two hide them."""
    one, two, all_ = (at_once(DUPLEX, load=0, banks=8 * n).units for n in (1, 2, 4))
    assert one / all_ == pytest.approx(128 / 170)
    assert two == pytest.approx(all_)
    assert all_ == pytest.approx(sustained_bandwidth(DUPLEX))


def test_duplexs_sides_do_not_share_a_path() -> None:
    """Its added TSVs are beside the host's; nothing is said of power."""
    busy = at_once(DUPLEX, load=1, banks=24)
    assert busy.host == pytest.approx(3.35e12, rel=1e-6)
    assert busy.units == pytest.approx(sustained_bandwidth(DUPLEX))


def test_a_buffers_units_share_the_hosts_path() -> None:
    pim = Pim(load_pim("attacc"), "buffer")
    assert at_once(pim, load=0.25, banks=16).units == pytest.approx(0.75 * sustained_bandwidth(pim))


def test_power_that_the_host_draws_is_not_the_units() -> None:
    """AttAcc's banks under 26.22 W: at full load the host's 3.59 pJ a bit are 19.1 W of them."""
    pim = Pim(load_pim("attacc"), "bank_group")
    busy = at_once(pim, load=1, banks=16)
    left = 26.22 - 665.6e9 * 8 * 3.59e-12
    assert busy.units == pytest.approx(left / (8 * 1.56e-12))
    assert busy.units < 0.4 * at_once(pim, load=0, banks=16).units


@given(
    st.floats(0, 1), st.floats(0, 1), st.integers(8, 31),
    st.sampled_from(["bank_group", "buffer"]),
)  # fmt: skip
def test_more_load_never_leaves_more(load: float, more: float, banks: int, unit: str) -> None:
    pim = Pim(load_pim("attacc"), unit)
    low, high = sorted((load, more))
    calm, busy = at_once(pim, load=low, banks=banks), at_once(pim, load=high, banks=banks)
    assert busy.units <= calm.units * (1 + 1e-12)
    assert calm.units <= sustained_bandwidth(pim) * (1 + 1e-12)


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(InputError, match=r"share: 1\.2 -- between 0 and 1"):
        in_turns(HBM_PIM, share=1.2, period=1e-3, change=0)
    with pytest.raises(InputError, match="turns of 1 us -- a change of mode takes 2 us"):
        in_turns(HBM_PIM, share=0.01, period=100e-6, change=2e-6)
    with pytest.raises(InputError, match=r"load: -0\.1 -- between 0 and 1"):
        at_once(DUPLEX, load=-0.1, banks=8)
    with pytest.raises(InputError, match="banks: all 32 of a channel, and a host that reads"):
        at_once(DUPLEX, load=0.5, banks=32)
    with pytest.raises(InputError, match="banks: 4 of a channel -- units read 8"):
        at_once(DUPLEX, load=0, banks=4)
