"""Fixtures that tests of several modules share."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from bef_jax.configs import quickstart

# Tests run a compiled program only a few times, so optimising would not pay. A session has its own
# compilation cache, which pytest's workers inherit. So a run and its resumption compile only once,
# in one process or in two.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older code generator compiles a training step in half the time of the newer one. Later
# versions of jaxlib no longer have it, and XLA aborts at a flag that it does not know.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="bef_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

ROOT = Path(__file__).resolve().parents[1]
# Prints what a user reads for each line of code. It may take at most one GiB more memory.
PRINT_RESULTS = """
import resource, sys
from pathlib import Path
from bef_jax.configs.default import get_config
from bef_jax.data import sources, store
from bef_jax.data.sources import hdf5, npz, pcam_download, pcam_hdf5, rpcam
from bef_jax.errors import UserError
from bef_jax.runtime import files

def data_of(source, folder, **fields):
    data = get_config().data
    data.update({"source": source, "dir": folder, **fields})
    return data

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for line in sys.argv[1:]:
    try:
        print("read:", eval(line))
    except UserError as error:
        print(error)
"""

SHRUNK = {
    "batch_size": 8,
    "steps": 6,
    "log_every": 1,
    "rcc.min_size": 40,
    "rcc.max_size": 48,
    "rcc.eval_size": 48,
    "data.train_size": 40,
    "data.valid_size": 21,
    "data.test_size": 13,
    "eval.batch_size": 8,
    "eval.every_epochs": 0.8,  # 4 steps
    "checkpoint.every_steps": 3,
}


def train_command(workdir, data_dir, *flags: str, **fields) -> list[str]:
    """Returns the command that trains the shrunk quickstart, with more flags and other fields."""
    fields = SHRUNK | {"data.dir": data_dir} | fields
    return [
        sys.executable, "-m", "bef_jax.main", "--config=configs/quickstart.py", *flags,
        f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip


def environment_of(devices: int) -> dict[str, str]:
    """Returns the environment of a process that has `devices` CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def printed_by():
    """Returns printed_by(*code): what a user reads for each line.

    A line must not hang, or take one GiB more memory.
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux reports how much memory a process has")

    def run(*code):
        command = [sys.executable, "-c", PRINT_RESULTS, *code]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr[-3000:]
        lines = ran.stdout.splitlines()
        assert len(lines) == len(code)
        return lines

    return run


@pytest.fixture(scope="session")
def pcam_dir() -> Path:
    """Returns the folder of real PCam patches, with pcam_subset.py, which reads them."""
    if "BEF_PCAM_DIR" not in os.environ:
        pytest.skip("BEF_PCAM_DIR is not set: no real PCam patches to read")
    return Path(os.environ["BEF_PCAM_DIR"])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which the tests of one session share a synthetic store."""
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture
def small_config(data_dir: Path) -> Callable[..., ConfigDict]:
    """Returns small_config(**{"a.b": value}): the quickstart, with six quick steps."""

    def make(**fields) -> ConfigDict:
        config = quickstart.get_config()
        config.update_from_flattened_dict({**SHRUNK, "data.dir": str(data_dir), **fields})
        return config

    return make


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which the tests of one module find the run of `run_summary`."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def run_summary(workdir: Path, small_config: Callable[..., ConfigDict]) -> dict:
    """Returns the summary of a run of four steps, which the first test of a module trains."""
    from bef_jax import train  # here: JAX reads the environment, set above, when it is imported

    return train.train_and_evaluate(small_config(steps=4), workdir)


@pytest.fixture
def scoring(workdir: Path) -> Callable[..., tuple[ConfigDict, Path]]:
    """Returns scoring(**changes) -> (config, path) of the best checkpoint of `run_summary`."""
    from bef_jax.scoring import trained
    from bef_jax.training import checkpoint

    def make(**changes) -> tuple[ConfigDict, Path]:
        path = checkpoint.best(workdir)
        return trained.scoring_config(path, None, changes), path

    return make
