"""Compares two processes on this machine with one that has as many devices.

Other tests kill one of two processes, or look at what JAX is asked for.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from bef_jax.configs import default
from bef_jax.errors import UserError
from bef_jax.runtime import distributed
from tests.conftest import SHRUNK, environment_of

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip


# ---- when processes join ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "announced"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, False),  # in sbatch
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True),  # GKE
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_launchers_announce_several_processes(environment, announced):
    assert distributed.is_announced(environment) is announced


def test_a_task_alone_on_its_node_takes_all_gpus():
    assert distributed.node_devices(SLURM) is None
    assert distributed.node_devices(SLURM | {"SLURM_NTASKS": "2"}) == list(range(8))
    assert distributed.node_devices({"SLURM_GPUS_ON_NODE": "8"}) is None  # outside of a step


@pytest.fixture
def calls(monkeypatch):
    """Returns the arguments of calls of jax.distributed.initialize, which does nothing here."""
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: found.append(given))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_"))]:
        monkeypatch.delenv(name)
    return found


def settings(**fields) -> ConfigDict:
    config = default.get_config().distributed
    config.update(fields)
    return config


def test_a_single_process_does_not_connect(calls):
    with distributed.initialize(settings()):
        assert distributed.is_first()
    assert not calls


def test_a_given_address_is_used_and_no_launcher_is_asked(calls):
    place = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
    with distributed.initialize(settings(**place)):
        pass
    (call,) = calls
    assert call["coordinator_address"] == "10.0.0.1:1234"
    assert (call["num_processes"], call["process_id"]) == (2, 1)
    assert call["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize("fields", [{"coordinator": "auto"}, {}])
def test_without_an_address_jax_asks_the_launcher(fields, calls, monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    with distributed.initialize(settings(timeout_seconds=9, **fields)):
        pass
    (call,) = calls
    assert "coordinator_address" not in call
    assert call["local_device_ids"] == list(range(8))
    assert call["initialization_timeout"] == call["heartbeat_timeout_seconds"] == 9


def test_settings_that_lack_numbers_are_refused_with_the_fields_to_set(monkeypatch):
    def refuse(**_):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    message = r"config\.distributed: Number of processes.*num_processes and process_id"
    with (
        pytest.raises(UserError, match=message),
        distributed.initialize(settings(coordinator="auto")),
    ):
        pass


# ---- processes ----------------------------------------------------------------------------------


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(workdir, data_dir, processes, devices, only=None, flags=(), **fields):
    """Starts a run as several processes, or only those numbered in `only`; returns them."""
    small = {"batch_size": 16, "model.attention": "none"}
    fields = SHRUNK | small | {"data.dir": data_dir} | fields
    if processes > 1:
        place = {"coordinator": f"127.0.0.1:{free_port()}", "num_processes": processes}
        place = {"timeout_seconds": 60} | place
        fields = {f"distributed.{name}": value for name, value in place.items()} | fields
    command = [
        sys.executable, "-m", "bef_jax.main", "--config=configs/quickstart.py",
        f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields.items()),
        *flags,
    ]  # fmt: skip
    return [
        subprocess.Popen(
            command + ([f"--config.distributed.process_id={number}"] if processes > 1 else []),
            env=environment_of(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in only or range(processes)
    ]


@contextlib.contextmanager
def running(*args, **fields):
    """Starts processes as `start` does, and kills those that still run at the end."""
    processes = start(*args, **fields)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def finish(processes):
    """Waits for the processes, which must succeed; returns the stdout and the stderr of each."""
    printed = [process.communicate(timeout=500) for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors
    return printed


def wait_for_steps(workdir, count):
    file, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_run(workdir, expected_workdir, steps):
    ours, expected = losses(workdir), losses(expected_workdir)
    assert sorted(ours) == sorted(expected) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(ours.values()), list(expected.values()), atol=1e-5)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data_dir):
    """Returns the workdir of a run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("one")
    finish(start(workdir, data_dir, processes=1, devices=2))
    return workdir


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(data_dir, tmp_path):
    with running(tmp_path, data_dir, processes=2, devices=1, steps=2000) as pair:
        wait_for_steps(tmp_path, 2)
        pair[1].send_signal(signal.SIGTERM)  # the one that does not write
        (first, _), (second, errors) = finish(pair)
    (line,) = first.splitlines()  # only the summary is on stdout
    summary = json.loads(line)
    assert not second
    assert "all hosts save at step" in errors
    checkpoints = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints[-1] == summary["step"] < 2000


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(one_process, data_dir, tmp_path):
    with running(tmp_path, data_dir, processes=2, devices=1) as pair:
        (first, _), (second, _) = finish(pair)
    assert_same_run(tmp_path, one_process, steps=6)
    ours = json.loads(first)["valid"]
    expected = json.loads((one_process / "train_summary.json").read_text())["valid"]
    assert ours["split"] == expected["split"]
    np.testing.assert_allclose(figures(ours), figures(expected), rtol=1e-5)
    assert not second


def figures(block):
    """Returns the network's own figures; those of the temperature are exact only to 1e-5."""
    own = [block[name] for name in sorted(block) if not isinstance(block[name], dict | str)]
    return np.hstack(own)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_process_ends_the_other_with_one_clear_line(victim, data_dir, tmp_path):
    with running(tmp_path, data_dir, processes=2, devices=1, steps=2000) as pair:
        wait_for_steps(tmp_path, 1)
        pair[victim].kill()
        survivor, killed_at = pair[1 - victim], time.monotonic()
        _, errors = survivor.communicate(timeout=60)
        assert time.monotonic() - killed_at < 60
    assert survivor.returncode not in (0, None)
    assert "goes on from its last checkpoint" in errors.splitlines()[-1]


@pytest.mark.long
def test_a_process_that_never_joins_gives_one_clear_line(data_dir, tmp_path):
    fields = {"distributed.timeout_seconds": 3}
    with running(tmp_path, data_dir, processes=2, devices=1, only=[0], **fields) as (process,):
        _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "not every process of the run joined within 3 s" in errors.splitlines()[-1]


@pytest.fixture
def real_patches(pcam_dir, tmp_path):
    """Returns the fields that read 160 real patches for training and 160 for evaluation."""
    script = [sys.executable, pcam_dir / "pcam_subset.py", "npz", tmp_path / "npz"]
    subprocess.run([*script, "--limit", "160"], check=True, capture_output=True)
    sizes = {"data.train_size": 160, "data.valid_size": 160}
    return {"data.source": "npz", "data.dir": tmp_path / "npz"} | sizes


@pytest.mark.long
@pytest.mark.parametrize("placement", ["host", "device"])
def test_two_processes_of_four_devices_train_on_real_patches_as_one_of_eight(
    placement, real_patches, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("NPROC", "8")
    fields = real_patches | {"steps": 20, "data.placement": placement}
    with running(tmp_path / "pair", data_dir, processes=2, devices=4, **fields) as pair:
        (ours, _), _ = finish(pair)
    # Figures are equal to the last digit only if sums have the same order. Over devices it is
    # Gloo's, which a single process uses only if it has a coordinator. Within products it depends
    # on the number of threads, which is NPROC; by default it is that of cores, or of devices if
    # there are more of them.
    fields |= {
        "distributed.coordinator": f"127.0.0.1:{free_port()}",
        "distributed.num_processes": 1,
        "distributed.process_id": 0,
    }
    ((expected, _),) = finish(start(tmp_path / "one", data_dir, 1, devices=8, **fields))
    assert_same_run(tmp_path / "pair", tmp_path / "one", steps=20)
    ours, expected = (json.loads(summary)["valid"] for summary in (ours, expected))
    assert ours == expected


@pytest.mark.long
def test_two_processes_evaluate_as_one_does_to_the_last_digit(one_process, data_dir, tmp_path):
    flags = ["--mode=eval", f"--checkpoint={one_process / 'checkpoints' / '6'}"]
    with running(tmp_path / "pair", data_dir, processes=2, devices=1, flags=flags) as pair:
        (ours, _), _ = finish(pair)
    ((expected, _),) = finish(start(tmp_path / "one", data_dir, 1, devices=2, flags=flags))
    assert json.loads(ours) == json.loads(expected)


@pytest.mark.long
def test_a_run_moved_from_8_devices_to_2_to_1_equals_an_uninterrupted_run(data_dir, tmp_path):
    fields = {"steps": 60, "checkpoint.every_steps": 20}
    stops = [0]
    for devices in (8, 2):
        (process,) = start(tmp_path / "moved", data_dir, processes=1, devices=devices, **fields)
        wait_for_steps(tmp_path / "moved", stops[-1] + 3)
        process.send_signal(signal.SIGTERM)
        ((summary, _),) = finish([process])
        stops.append(json.loads(summary)["step"])
    assert 0 < stops[1] < stops[2] < 60
    finish(start(tmp_path / "moved", data_dir, processes=1, devices=1, **fields))
    finish(start(tmp_path / "still", data_dir, processes=1, devices=8, **fields))
    assert_same_run(tmp_path / "moved", tmp_path / "still", steps=60)
