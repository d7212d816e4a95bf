"""Look-ups in the table of chips, and the magnitudes of its figures."""

import pytest

from bef_jax.planning.chips import CHIPS, by_name, peak_flops


def test_a_peak_that_is_not_published_is_none():
    assert peak_flops("NVIDIA L4", "bfloat16") == 121e12
    assert peak_flops("NVIDIA L40S", "bfloat16") is None
    assert peak_flops("NVIDIA L4", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None


def test_each_name_belongs_to_one_chip():
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    names = [chip.name for chip in CHIPS if chip.name]
    assert len(set(kinds)) == len(kinds) and len(set(names)) == len(names)
    assert by_name("v6e").kinds == ("TPU v6 lite", "TPU v6e")
    assert by_name("h200") is None  # it has a peak, but no figures for a plan


# Each kind of figure lies in one range. A figure in bits instead of bytes, or in the wrong column,
# mostly falls outside of it.
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.kind)
def test_figures_have_the_magnitude_of_one_device(chip):
    if chip.platform == "cpu":
        return
    assert 1e14 < chip.peak_flops < 1e15
    if chip.name:
        assert 1e9 < chip.hbm_bytes < 1e11 < chip.hbm_bandwidth < 1e13
        assert 1e10 < chip.link_bandwidth < chip.hbm_bandwidth
