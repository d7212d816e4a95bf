"""Checks what a configuration asks of the devices, with stand-ins for devices of each kind."""

from types import SimpleNamespace

import numpy as np
import pytest

from bef_jax import config as checks
from bef_jax.configs import default
from bef_jax.errors import UserError


def check_on(kind, devices=8, **fields):
    config = default.get_config()
    config.update_from_flattened_dict({"batch_size": 1024, **fields})
    device = SimpleNamespace(device_kind=kind)
    mesh = SimpleNamespace(size=devices, devices=np.full(devices, device))
    checks.check_devices(config, mesh)


def test_micro_batches_must_split_evenly_over_devices():
    check_on("cpu")
    with pytest.raises(UserError, match=r"config.batch_size=20 can't be split over 8 devices"):
        check_on("cpu", **{"batch_size": 20})
    with pytest.raises(
        UserError, match=r"config.batch_size / optim.accumulate=8 can't be split over 16 devices"
    ):
        check_on("cpu", devices=16, **{"batch_size": 32, "optim.accumulate": 4})


@pytest.mark.parametrize(
    ("fields", "images"),
    [
        ({"batch_size": 64, "bn_groups": 8}, 8),
        ({"batch_size": 8}, 8),  # the size of a group counts, not the number of groups
        ({"batch_size": 1024, "bn_groups": 8, "optim.accumulate": 16}, 8),
        ({"batch_size": 128, "bn_groups": 8}, None),
    ],
)
def test_batch_statistics_over_few_images_give_a_warning(fields, images, caplog):
    check_on("cpu", **fields)
    expected = [f"batch statistics over {images} images are noisy"] if images else []
    assert [line.partition(":")[0] for line in caplog.messages] == expected


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_kernels_run_on_chips_that_hold_them_if_each_has_whole_groups(kind):
    check_on(kind, **{"model.mbconv": "pallas", "bn_groups": 8})
    with pytest.raises(UserError, match=r"config.bn_groups=4 can't be split over 8 devices"):
        check_on(kind, **{"model.mbconv": "pallas", "bn_groups": 4})


@pytest.mark.parametrize("kind", ["TPU v4", "TPU7x", "NVIDIA H100 80GB HBM3", "cpu"])
def test_kernels_are_refused_on_other_chips(kind):
    with pytest.raises(UserError, match=f"not for {kind}: choose layers"):
        check_on(kind, **{"model.mbconv": "pallas", "bn_groups": 8})
