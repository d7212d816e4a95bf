"""Each worker's share of the cores, and its GPU or TPU chip, which this machine need not have."""

import os
import subprocess
import sys

import pytest

from bef_jax.ablation import workers
from bef_jax.errors import RunError

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system has no way to choose cores"
)


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """Hides the accelerators of this machine from find_workers, which asks a process of its own."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_one_run_has_the_whole_cpu():
    assert workers.find_workers(None) == [workers.Worker()]


def test_a_process_that_dies_without_a_word_is_reported(monkeypatch):
    monkeypatch.setattr(workers, "_REPORT_DEVICES", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RunError, match=r"^JAX finds no device: it ended with -9$"):
        workers.find_workers(None)


@needs_affinity
def test_every_core_belongs_to_one_worker():
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core can't be shared")
    found = workers.find_workers(2)
    assert sorted(core for worker in found for core in worker.cores) == sorted(cores)
    assert len(workers.find_workers(10_000)) == len(cores)


@needs_affinity
def test_a_pinned_process_sees_only_its_cores():
    worker = workers.Worker(cores=(min(os.sched_getaffinity(0)),))
    script = "input(); import os; print(os.sched_getaffinity(0))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker.pin(process.pid)
    assert process.communicate("\n")[0].strip() == str(set(worker.cores))


def test_each_worker_has_one_of_the_visible_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = workers._accelerators("gpu", 3)
    assert [worker.environment()["CUDA_VISIBLE_DEVICES"] for worker in found] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    found = workers._accelerators("gpu", 2)
    assert [worker.environment()["CUDA_VISIBLE_DEVICES"] for worker in found] == ["4", "6"]


def test_each_worker_sees_only_its_own_tpu_chip():
    first, second = (worker.environment() for worker in workers._accelerators("tpu", 2))
    assert (first["TPU_VISIBLE_CHIPS"], second["TPU_VISIBLE_CHIPS"]) == ("0", "1")
    assert first["TPU_PROCESS_BOUNDS"] == "1,1,1"
