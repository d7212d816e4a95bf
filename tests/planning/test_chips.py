from bef_jax.planning import chips
from bef_jax.planning.chips import CHIPS


def test_a_peak_is_never_a_guess():
    assert chips.peak_flops("NVIDIA L4", "bfloat16") == 121e12
    assert chips.peak_flops("NVIDIA L40S", "bfloat16") is None
    assert chips.peak_flops("NVIDIA L4", "float32") is None
    assert chips.peak_flops("cpu", "bfloat16") is None


def test_every_chip_that_is_planned_for_has_a_peak():
    peaks = {name: chips.peak_flops(chip.kind, "bfloat16") for name, chip in CHIPS.items()}
    assert peaks.pop("cpu") is None
    assert all(1e14 < peak < 1e15 for peak in peaks.values()), peaks
