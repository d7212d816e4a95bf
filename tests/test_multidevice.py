"""Compares training on eight CPU devices with training on one."""

import json
import subprocess

import numpy as np
import pytest

from tests.conftest import environment_of, train_command

STEPS = 20


def run(workdir, data_dir, devices, **fields):
    """Trains in a fresh process; returns its summary and the loss of every step."""
    # Evaluate and save only at the end, because both would take longer than the steps.
    fields = {"eval.every_epochs": 1000.0, "checkpoint.every_steps": 1000} | fields
    fields = {"batch_size": 16, "steps": STEPS} | fields
    command = train_command(workdir, data_dir, **fields)
    result = subprocess.run(command, env=environment_of(devices), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return json.loads(result.stdout), np.array(losses)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, data_dir):
    """Returns the summary and the losses of the same run on one device."""
    return run(tmp_path_factory.mktemp("one"), data_dir, devices=1)


@pytest.mark.slow
@pytest.mark.parametrize("placement", [pytest.param("host", marks=pytest.mark.smoke), "device"])
def test_eight_devices_train_as_one_does(one_device, placement, data_dir, tmp_path):
    expected_summary, expected = one_device
    summary, losses = run(tmp_path, data_dir, devices=8, **{"data.placement": placement})
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert summary["valid"]["n"] == expected_summary["valid"]["n"] == 21
    np.testing.assert_allclose(summary["valid"]["loss"], expected_summary["valid"]["loss"], 1e-3)


def test_a_batch_that_devices_cannot_share_is_refused(data_dir, tmp_path):
    with pytest.raises(AssertionError, match=r"config.batch_size=12 can't be split over 8 devices"):
        run(tmp_path, data_dir, devices=8, batch_size=12)
