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


@pytest.mark.parametrize(
    "chip", [chip for chip in CHIPS if chip.platform != "cpu"], ids=lambda chip: chip.kind
)
def test_figures_have_the_magnitude_of_one_device(chip):
    assert 1e14 < chip.peak_flops < 1e15
    if chip.name:
        assert 1e10 < chip.hbm_bytes < 1e11
        # Ratios differ less from chip to chip than figures do, so a figure in bits instead of bytes
        # falls outside these bounds.
        assert 0.015 < chip.hbm_bytes / chip.hbm_bandwidth < 0.1  # seconds to read all memory
        assert 0.1 < chip.link_bandwidth / chip.hbm_bandwidth < 0.3


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("l4", 16 * 16e9 / 8),  # PCIe 4.0: 16 lanes of 16 Gbit/s each way
        ("a100", 12 * 25e9),  # NVLink 3: 12 links of 25 GB/s each way
        ("h100", 18 * 25e9),  # NVLink 4: 18 links of 25 GB/s each way
    ],
)
def test_links_of_gpus_count_one_direction(name, bandwidth):
    assert by_name(name).link_bandwidth == bandwidth
