"""Rooflines of made-up steps on v5e, compared with values worked out by hand."""

import pytest

from bef_jax.planning import chips
from bef_jax.planning.compiled_step import Figures
from bef_jax.planning.roofline import roofline

V5E = chips.by_name("v5e")


def figures(flops=0.0, hbm_traffic=0.0, collectives=None):
    known = {"flops": flops, "hbm_traffic": hbm_traffic, "collectives": collectives or {}}
    return Figures(**known, seconds=0.0)


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
    found_seconds, found_bound = roofline(step, V5E, n=8)
    assert (found_seconds, found_bound) == (pytest.approx(seconds), bound)


@pytest.mark.parametrize(
    ("step", "chip"),
    [
        (figures(None, 1.0), V5E),
        (figures(1.0, None), V5E),
        (figures(1.0, 1.0), chips.by_name("cpu")),
    ],
)
def test_an_unknown_figure_gives_no_roofline(step, chip):
    assert roofline(step, chip, n=8) == (None, None)
