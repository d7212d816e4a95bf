"""Compilers' figures and errors, and where the training split is placed on other hardware."""

import pytest

from bef_jax.configs.default import get_config
from bef_jax.planning import chips, compiled_step
from bef_jax.runtime import sharding

V5E = chips.by_name("v5e")


def test_bytes_wanted_are_read_from_the_error_of_libtpu():
    message = "RESOURCE_EXHAUSTED: ... Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
    assert compiled_step.bytes_wanted(message) == 17.5 * 2**30
    assert compiled_step.bytes_wanted("RESOURCE_EXHAUSTED: no more") is None


class Program:
    """A compiled program, as far as the plan looks at it, that negates 8 numbers in a loop."""

    def __init__(self, trips, costs):
        self.trips, self.costs = trips, costs

    def as_text(self):
        return f"""%body (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %b = f32[8]{{0}} negate(%a)
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %w = f32[8]{{0}} while(%p), condition=%c, body=%body{self.trips}
}}
"""

    def cost_analysis(self):
        return self.costs

    def memory_analysis(self):
        return None


TRIPS = ', backend_config={"known_trip_count":{"n":"3"}}'
COSTS = {"flops": 8.0, "bytes accessed": 100.0}


@pytest.mark.parametrize(
    ("chip", "accumulate", "trips", "costs", "expected"),
    [
        # (flops, bytes accessed, bytes of main memory, kernels)
        ("v5e", 1, TRIPS, COSTS, (8.0, 100.0, 100.0, None)),
        ("v5e", 1, "", COSTS, (8.0, 100.0, 64, None)),
        ("v5e", 2, TRIPS, COSTS, (None, None, 192, None)),
        ("v5e", 2, "", COSTS, (None, None, None, None)),
        ("h100", 1, TRIPS, None, (None, None, 192, 3)),
        ("h100", 2, TRIPS, None, (None, None, 192, 3)),
        ("h100", 1, "", None, (None, None, None, None)),
    ],
)
def test_figures_of_a_loop_are_those_of_all_turns(chip, accumulate, trips, costs, expected):
    config = get_config()
    config.optim.accumulate = accumulate
    program = Program(trips, costs)
    figures = compiled_step._reported(program, config, chips.by_name(chip), seconds=1.0)
    found = (figures.flops, figures.bytes_accessed, figures.hbm_traffic, figures.kernels)
    assert found == expected


@pytest.mark.parametrize(
    ("placement", "chip", "placed"),
    [
        ("host", V5E, False),
        ("device", V5E, True),
        ("auto", V5E, False),  # its 300,000 patches take over half of 16 GB
        ("auto", chips.by_name("h100"), True),
        ("auto", chips.by_name("cpu"), False),
    ],
)
def test_the_split_is_placed_where_training_would_place_it(placement, chip, placed):
    config = get_config(f"data.placement={placement}")
    if chip is V5E and placement == "auto":
        config.data.train_size = 300_000
    split = compiled_step.placed_split(config, sharding.make_mesh(), chip)
    assert (split is not None) == placed
    assert split is None or len(split.images.shape) == 4


@pytest.mark.parametrize(("side", "placed"), [(96, True), (224, False)])
def test_larger_patches_need_more_room_for_the_split(side, placed):
    """PCam's 262,144 patches take 7 GB at 96 px, and 39 GB at 224 px, of v5p's 95 GB."""
    config = get_config(f"data.patch_size={side}")
    config.data.train_size = 400_000
    split = compiled_step.placed_split(config, sharding.make_mesh(), chips.by_name("v5p"))
    assert (split is not None) == placed
    assert split is None or split.images.shape == (400_000, side, side, 3)
