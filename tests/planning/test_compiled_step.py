"""Compilers' errors, and where the training split is placed on other hardware."""

import pytest

from bef_jax.configs.default import get_config
from bef_jax.planning import chips, compiled_step
from bef_jax.runtime import sharding

V5E = chips.by_name("v5e")


def test_bytes_wanted_are_read_from_the_error_of_libtpu():
    message = "RESOURCE_EXHAUSTED: ... Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
    assert compiled_step.bytes_wanted(message) == 17.5 * 2**30
    assert compiled_step.bytes_wanted("RESOURCE_EXHAUSTED: no more") is None


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
