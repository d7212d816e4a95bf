"""Compares runs on a GPU with the same runs on a CPU; without a GPU, each test is skipped.

    pytest -m gpu tests/test_gpu.py

A run is a process of its own, because JAX starts one kind of device for each. All are started at
once. BEF_GPU_PLATFORM is JAX's name for the GPU's platform. With BEF_GPU_PLATFORM=cpu the tests
compare the CPU with itself, to try out the tests.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import train_command

PLATFORM = os.environ.get("BEF_GPU_PLATFORM", "cuda")
BACKEND = "cpu" if PLATFORM == "cpu" else "gpu"  # what JAX calls it, whoever made the GPU
pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Two epochs, so that the order of the second one counts. It only saves, and evaluates at the end.
STEPS = 10
FIELDS = {"steps": STEPS, "eval.every_epochs": 1000.0, "checkpoint.every_steps": 5}
HOST, DEVICE = {"data.placement": "host"}, {"data.placement": "device"}
# Name of a run -> where it runs, and what differs.
RUNS = {
    "cpu": ("cpu", HOST),
    "cpu_bfloat16": ("cpu", HOST | {"dtype": "bfloat16"}),
    "gpu": (PLATFORM, HOST),
    "gpu_bfloat16": (PLATFORM, HOST | {"dtype": "bfloat16"}),
    "gpu_placed": (PLATFORM, DEVICE),
    "gpu_several": (PLATFORM, DEVICE | {"steps_per_call": 5}),
    "gpu_exact": (PLATFORM, HOST),
}
# Two programs add up float32 in different orders, so their losses differ by some 1e-7 at first. The
# steps enlarge this. Another seed or order of patches changes the losses by 1e-2.
SAME = 1e-4


def environment_of(platform, exact=False):
    """Returns the environment of a run on a platform.

    A GPU multiplies float32 in full precision, and adds up in a fixed order if the run is `exact`.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": platform if platform == "cpu" else f"{platform},cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # by default a GPU rounds the factors
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the runs share its memory
    }
    if platform != "cpu":  # as a user's program is compiled, not as conftest.py has it
        environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    if exact:
        # By default atomic sums and the choice of algorithms differ from run to run.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
        environment["XLA_FLAGS"] = flags
    return environment


@pytest.fixture(scope="module")
def gpu():
    """Skips the test if JAX has no GPU here."""
    # JAX's plug-ins for GPUs are in this package. Without one, JAX need not be asked.
    if PLATFORM != "cpu" and importlib.util.find_spec("jax_plugins") is None:
        pytest.skip("no GPU")
    # Where the GPU does not start, JAX takes the CPU instead.
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    asked = subprocess.run(command, env=environment_of(PLATFORM), capture_output=True, text=True)
    if asked.stdout.split() != [BACKEND]:
        pytest.skip(f"no GPU: {' '.join(asked.stderr.split())[-100:]}")


class Run:
    """A process that runs the program, and starts at once."""

    def __init__(self, command, folder, platform, exact=False):
        folder.mkdir(exist_ok=True)
        self.printed, self.log = folder / "printed", folder / "log"
        with self.printed.open("w") as stdout, self.log.open("w") as stderr:
            environment = environment_of(platform, exact)
            self.process = subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)
        self.workdir, self.backend = folder, BACKEND if platform == PLATFORM else "cpu"

    def summary(self):
        """Waits for the end, and returns the summary."""
        status, log = self.process.wait(), self.log.read_text()
        assert status == 0, log[-3000:]
        assert f"({self.backend}, jax" in log
        return json.loads(self.printed.read_text())

    def losses(self):
        """Waits for the end, and returns the loss of each step."""
        self.summary()
        lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
        losses = {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}
        assert [*losses] == [*range(1, STEPS + 1)]
        return np.array([*losses.values()])


@pytest.fixture(scope="module")
def runs(gpu, tmp_path_factory):
    """Returns the runs by their names, all of them started."""
    folder, started = tmp_path_factory.mktemp("runs"), {}
    try:
        for name, (platform, fields) in RUNS.items():
            command = train_command(folder / name, folder / f"data_{name}", **FIELDS | fields)
            started[name] = Run(command, folder / name, platform, exact=name == "gpu_exact")
        yield started
    finally:
        for run in started.values():
            run.process.kill()


def test_losses_are_those_of_the_cpu(runs):
    np.testing.assert_allclose(runs["gpu"].losses(), runs["cpu"].losses(), rtol=SAME)


def test_bfloat16_is_as_exact_as_on_the_cpu(runs):
    """Bfloat16 itself costs more than a platform, so both are compared with float32."""
    expected = runs["cpu"].losses()
    ours, cpus = (runs[name].losses() - expected for name in ("gpu_bfloat16", "cpu_bfloat16"))
    # Both errors are random, so we allow a factor of 3. Another seed would be 40 times as far away.
    assert np.linalg.norm(ours) < 3 * np.linalg.norm(cpus)
    assert np.linalg.norm(ours) > np.linalg.norm(runs["gpu"].losses() - expected)  # it is bfloat16


@pytest.mark.parametrize("name", ["gpu_placed", "gpu_several"])
def test_data_on_the_gpu_and_several_steps_in_a_call_give_the_same_losses(name, runs):
    np.testing.assert_allclose(runs[name].losses(), runs["gpu"].losses(), rtol=SAME)


def test_a_checkpoint_is_evaluated_as_on_the_cpu(runs, tmp_path):
    """Under eight views, which turn the patches on the device."""
    runs["cpu"].summary()
    found = {}
    for name, platform in (("cpu", "cpu"), ("gpu", PLATFORM)):
        folder = tmp_path / name
        command = [sys.executable, "-m", "bef_jax.main", "--mode=eval", "--config.eval.tta=8"]
        command += [f"--checkpoint={runs['cpu'].workdir / 'checkpoints' / str(STEPS)}"]
        summary = Run([*command, f"--workdir={folder}"], folder, platform).summary()
        blocks = summary, summary["plain"]
        found[name] = [block[figure] for block in blocks for figure in ("loss", "brier")]
    # The same weights on both: only the sums of one pass differ, by some 1e-7.
    np.testing.assert_allclose(found["gpu"], found["cpu"], rtol=1e-5)


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(runs, tmp_path):
    whole = runs["gpu_exact"]
    expected = whole.summary()
    workdir = shutil.copytree(whole.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    (workdir / "train_summary.json").unlink()
    command = [f"--workdir={workdir}" if part.startswith("--workdir") else part
               for part in whole.process.args]  # fmt: skip
    resumed = Run(command, workdir, PLATFORM, exact=True)
    assert resumed.summary()["params_digest"] == expected["params_digest"]
    assert "at step 5" in resumed.log.read_text()
    assert resumed.losses().tolist() == whole.losses().tolist()
