"""The stage `numeric`: are the losses a CPU's, and do the tests for GPUs pass?"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from gpu_check import last_record

from bef_jax.configs import quickstart
from bef_jax.data.batches import put_batch
from bef_jax.planning import benchmark
from bef_jax.runtime import sharding
from bef_jax.training.optim import learning_rates, make_schedule
from bef_jax.training.packing import make_packing
from bef_jax.training.state import create_state
from bef_jax.training.step import compile_step
from gpu_stages import emit

ROOT = Path(__file__).parents[2]
TINY = {"batch_size": 8, "rcc.min_size": 40, "rcc.max_size": 48, "rcc.eval_size": 48}


def numeric(options: argparse.Namespace) -> None:
    """Compares ten losses with a CPU's, and runs the tests that are marked gpu."""
    curves = {"cpu": start_curve(options, {"JAX_PLATFORMS": "cpu"})}
    curves["here"] = start_curve(options, {})
    report = options.out / "pytest.txt"  # keeps what the tests print if the stage is cut off
    with report.open("w") as file:
        tests = start_tests(file)
        losses = {name: read_curve(process) for name, process in curves.items()}
        record = {"losses": losses, "largest_relative_difference": difference(**losses)}
        emit(record)
        rc = tests.wait() if tests else 0
    lines = report.read_text().splitlines()
    emit(record | {"tests": lines[-1] if lines else "skipped: pytest is not installed"})
    if rc != 0 or not all(losses.values()):
        sys.exit("losses are missing, or tests failed: see pytest.txt")


def difference(cpu: list[float], here: list[float]) -> float | None:
    """Returns the largest difference of two losses, as a share of the CPU's; None without both."""
    if not (cpu and here):
        return None
    return max(abs(a - b) / abs(a) for a, b in zip(cpu, here, strict=True))


def start_curve(options: argparse.Namespace, environment: dict[str, str]) -> subprocess.Popen:
    """Starts the stage `curve` in full precision."""
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"} | environment
    command = [sys.executable, "-m", "gpu_stages", "curve", *["--tiny"] * options.tiny]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def read_curve(process: subprocess.Popen) -> list[float]:
    """Returns the losses that a process of `start_curve` prints; none if it fails."""
    printed, _ = process.communicate()
    return last_record(printed).get("losses", [])


def start_tests(file: TextIO) -> subprocess.Popen | None:
    """Starts the tests that are marked gpu, if pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        return None
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "-rs"]
    command += ["tests/test_gpu.py", "--color=no"]
    return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def curve(options: argparse.Namespace) -> None:
    """Reports the losses of ten steps of the smallest network with all changes, in float32."""
    config, mesh = quickstart.get_config("batch_size=32"), sharding.make_mesh()
    if options.tiny:
        config.update_from_flattened_dict(TINY)
    size = config.batch_size
    state = make_packing(config, mesh).pack(create_state(config, sharding.replicated(mesh)))
    batch = put_batch(benchmark.random_patches(size), mesh, np.arange(size))
    step = compile_step(config, mesh, state)
    losses = []
    for rates in learning_rates(make_schedule(config, 20, 10), 0, [1] * 10):
        state, metrics = step(state, batch, jax.random.key(0), rates, None)
        losses.append(float(metrics["loss"]))
    emit({"losses": losses})
