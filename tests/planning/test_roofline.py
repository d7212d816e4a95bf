"""Rooflines of made-up steps on v5e and H100, compared with values worked out by hand."""

import pytest

from bef_jax.planning import chips
from bef_jax.planning.compiled_step import Figures
from bef_jax.planning.roofline import Bounds, bounds, roofline

V5E, H100 = chips.by_name("v5e"), chips.by_name("h100")


def figures(flops=0.0, hbm_traffic=0.0, collectives=None, kernels=None):
    known = {"flops": flops, "hbm_traffic": hbm_traffic, "collectives": collectives or {}}
    return Figures(**known, kernels=kernels, seconds=0.0)


@pytest.mark.parametrize(
    ("step", "seconds", "bound"),
    [
        (figures(197e12, 819e9 / 2), 1.0, "compute"),
        (figures(197e12 / 2, 2 * 819e9), 2.0, "memory"),
        # A ring of 8 sends 7/8 of the bytes to add them up, and 7/8 again to share the sums.
        (figures(1.0, 1.0, {"all-reduce": {"count": 1, "bytes": 200e9}}), 1.75, "interconnect"),
        (figures(1.0, 1.0, {"reduce-scatter": {"count": 2, "bytes": 200e9}}), 7.0, "interconnect"),
        (figures(1.0, 1.0, {"all-gather": {"count": 2, "bytes": 200e9}}), 0.875, "interconnect"),
    ],
)
def test_roofline_is_the_slowest_of_compute_memory_and_links(step, seconds, bound):
    found_seconds, found_bound = roofline(bounds(step, V5E, n=8, network_flops=9e20))
    assert (found_seconds, found_bound) == (pytest.approx(seconds), bound)


def test_a_gpu_takes_the_networks_arithmetic_and_an_assumed_time_for_each_launch():
    step = figures(None, 3350e9 / 2, kernels=2_000_000)
    limits = bounds(step, H100, n=1, network_flops=989e12 / 4)
    assert limits == Bounds(compute=0.25, memory=0.5, interconnect=0.0, launches=5.0)
    # Launches take the longest here, but graphs may hide them.
    assert roofline(limits) == (0.5, "memory")


def test_a_tpu_has_no_launches():
    step = figures(1.0, 1.0, kernels=5)
    assert bounds(step, V5E, n=8, network_flops=1.0).launches is None


@pytest.mark.parametrize(
    ("step", "chip"),
    [
        (figures(1.0, None), V5E),
        (figures(1.0, None), H100),
        (figures(1.0, 1.0), chips.by_name("cpu")),
    ],
)
def test_an_unknown_figure_gives_no_roofline(step, chip):
    assert roofline(bounds(step, chip, n=8, network_flops=1.0)) == (None, None)


def test_unknown_links_are_left_out():
    limits = Bounds(compute=1.0, memory=2.0, interconnect=None, launches=3.0)
    assert roofline(limits) == (2.0, "memory")
