"""Kills runs at random moments, and compares their final weights with an undisturbed run's."""

import json
import os
import random
import subprocess
import time

import pytest

from tests.conftest import train_command

STEPS = 12


def command(workdir, data_dir):
    # Save at every step, so that most kills come during a save.
    return train_command(workdir, data_dir, steps=STEPS, **{"checkpoint.every_steps": 1})


def finish(workdir, data_dir):
    """Runs to the end; returns the summary and how many seconds it took."""
    began = time.monotonic()
    result = subprocess.run(command(workdir, data_dir), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), time.monotonic() - began


def kill_at_a_random_moment(workdir, data_dir, seconds, rng):
    """Starts the run and kills it, at any time from its start or soon after any of its steps.

    Returns:
        True if a save was under way.
    """
    process = subprocess.Popen(
        command(workdir, data_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines = rng.choice([0, len(logged(workdir)) + rng.randrange(1, STEPS)])
    latest = time.monotonic() + rng.uniform(0, seconds) + (seconds if lines else 0)
    while process.poll() is None and time.monotonic() < latest:
        if lines and len(logged(workdir)) >= lines:
            time.sleep(rng.uniform(0, 0.2))
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    return any((workdir / "checkpoints").glob("*tmp*"))


def logged(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    ("runs", "kills"),
    [pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(20, 1, marks=pytest.mark.long)],
)
def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(runs, kills, data_dir, tmp_path):
    seed = int(os.environ.get("BEF_KILL_SEED", time.time_ns()))
    rng = random.Random(seed)
    expected, seconds = finish(tmp_path / "undisturbed", data_dir)
    during_saves = 0
    for number in range(runs):
        workdir = tmp_path / f"run_{number}"
        hits = [kill_at_a_random_moment(workdir, data_dir, seconds, rng) for _ in range(kills)]
        during_saves += sum(hits)
        steps = len(logged(workdir))
        summary, seconds = finish(workdir, data_dir)
        print(f"run {number}: {steps} lines when last killed, in a save: {hits}")
        assert summary["params_digest"] == expected["params_digest"], f"seed {seed}"
        assert summary["valid"] == expected["valid"], f"seed {seed}"
    print(f"{runs} runs, {runs * kills} kills, {during_saves} of them in a save; seed {seed}")
