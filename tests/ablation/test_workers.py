import os
import subprocess
import sys

import pytest

from bef_jax.ablation import workers

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system lets nobody choose cores"
)


def test_one_run_has_the_whole_cpu():
    assert workers.find(None) == [workers.Slot()]


@needs_affinity
def test_cores_are_shared_out():
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core can't be shared")
    places = workers.find(2)
    assert sorted(core for place in places for core in place.cores) == sorted(cores)
    assert len(workers.find(10_000)) == len(cores)


@needs_affinity
def test_a_pinned_process_sees_its_cores_alone():
    place = workers.Slot(cores=(min(os.sched_getaffinity(0)),))
    script = "input(); import os; print(os.sched_getaffinity(0))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    place.pin(process.pid)
    assert process.communicate("\n")[0].strip() == str(set(place.cores))


def test_a_gpu_each_of_those_that_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    places = workers._accelerators("gpu", 3)
    assert [place.environment()["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    places = workers._accelerators("gpu", 2)
    assert [place.environment()["CUDA_VISIBLE_DEVICES"] for place in places] == ["4", "6"]


def test_a_tpu_chip_each_and_no_other_in_sight():
    first, second = (place.environment() for place in workers._accelerators("tpu", 2))
    assert (first["TPU_VISIBLE_CHIPS"], second["TPU_VISIBLE_CHIPS"]) == ("0", "1")
    assert first["TPU_PROCESS_BOUNDS"] == "1,1,1"
