import pytest

from bef_jax.configs.default import get_config
from bef_jax.planning import chips, compiled_step
from bef_jax.runtime import sharding

V5E = chips.by_name("v5e")


def test_libtpu_says_what_it_refuses():
    message = "RESOURCE_EXHAUSTED: ... Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
    assert compiled_step.bytes_wanted(message) == 17.5 * 2**30
    assert compiled_step.bytes_wanted("RESOURCE_EXHAUSTED: no more") is None


@pytest.mark.parametrize(
    ("placement", "chip", "placed"),
    [
        ("host", V5E, False),
        ("device", V5E, True),
        ("auto", V5E, False),  # PCam's 7.2 GB take nearly half of one v5e's 16
        ("auto", chips.by_name("h100"), True),
        ("auto", chips.by_name("cpu"), False),
    ],
)
def test_the_split_is_placed_as_training_would(placement, chip, placed):
    config = get_config(f"data.placement={placement}")
    if chip is V5E and placement == "auto":
        config.data.train_size = 300_000
    split = compiled_step.placed_split(config, sharding.make_mesh(), chip)
    assert (split is not None) == placed
    assert split is None or len(split.images.shape) == 4
