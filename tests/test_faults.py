"""Causes faults of docs/faults.md; checks the message, what stays, and how a run goes on."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bef_jax.data import store
from tests.conftest import SHRUNK, train_command

# Runs a command on a disk that it fills, and again after the disk has grown. A mount in a namespace
# of its own needs no root, and disappears with the last process.
SMALL_DISK = """
disk=$1 size=$2; shift 2
mount -t tmpfs -o "size=$size" tmpfs "$disk"
"$@" >"$disk.out1" 2>"$disk.err1"; echo $? >"$disk.status1"
find "$disk" >"$disk.there"
mount -o remount,size=1g "$disk"
"$@" >"$disk.out2" 2>"$disk.err2"; echo $? >"$disk.status2"
"""
READ_ONLY = 'mount -t tmpfs -o ro tmpfs "$1"; shift; exec "$@"'


def in_namespace(script, *args):
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *args]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def namespaces():
    if not shutil.which("unshare") or in_namespace("mount -t tmpfs tmpfs /mnt").returncode:
        pytest.skip("a tmpfs of our own can't be mounted here (unshare --user --mount)")


def run_on_small_disk(disk, size, command_line):
    """Runs a command on a disk of `size`, which it fills, and again on a larger one.

    Returns:
        Both statuses, the first run's stderr and the files it left, and the second run's stdout.
    """
    disk.mkdir()
    assert not in_namespace(SMALL_DISK, disk, size, *command_line).stderr

    def read(name):
        return disk.with_name(f"{disk.name}.{name}").read_text()

    statuses = [int(read(f"status{number}")) for number in (1, 2)]
    return statuses, read("err1"), read("there").splitlines(), read("out2")


def one_line(errors):
    """Returns the only line of `errors` that reports a failure."""
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith(("failed:", "error:"))]
    return line


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_disk_that_fills_during_prepare_leaves_no_store(tmp_path):
    disk = tmp_path / "disk"
    command_line = train_command(tmp_path / "work", disk, "--mode=prepare")
    statuses, errors, left_files, summary = run_on_small_disk(disk, "1m", command_line)
    assert statuses == [1, 0]
    assert "No space left on device" in one_line(errors)
    assert not [file for file in left_files if "store" in Path(file).name]
    assert json.loads(summary)["counts"] == {"train": 40, "valid": 21, "test": 13}


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_disk_that_fills_during_saves_costs_no_earlier_checkpoint(data_dir, tmp_path):
    disk = tmp_path / "disk"
    fields = {"checkpoint.every_steps": 1, "checkpoint.keep": 99}
    command_line = train_command(disk / "run", data_dir, **fields)
    statuses, errors, left_files, summary = run_on_small_disk(
        disk, "5m", command_line
    )  # three saves of six
    assert statuses == [1, 0], errors
    last = errors.splitlines()[-1]  # after the lines of threads of Orbax and tensorstore
    assert last.startswith("failed:")
    assert "No space left on device" in last
    assert str(disk / "run/checkpoints/1/state/manifest.ocdbt") in left_files
    undisturbed = subprocess.run(
        train_command(tmp_path / "undisturbed", data_dir, **fields), capture_output=True
    )
    assert json.loads(summary)["params_digest"] == json.loads(undisturbed.stdout)["params_digest"]


@pytest.mark.usefixtures("namespaces")
def test_a_read_only_workdir_is_refused_before_anything_is_compiled(data_dir, tmp_path):
    result = in_namespace(READ_ONLY, tmp_path, *train_command(tmp_path / "run", data_dir))
    assert result.returncode == 2
    assert "Read-only file system" in one_line(result.stderr)
    assert "--workdir" in one_line(result.stderr)


def start_and_wait(command_line, folder, lines):
    """Starts a run in `folder`/run; returns it once it has logged `lines` lines.

    Its output goes to files, because a pipe that nobody reads fills up and blocks the run.
    """
    file = folder / "run" / "metrics.jsonl"
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(command_line, stdout=out, stderr=err)
    while process.poll() is None and (
        not file.exists() or len(file.read_text().splitlines()) < lines
    ):
        time.sleep(0.05)
    return process


def wait_for_end(process, folder):
    """Waits for a run; returns its status, its stdout and its stderr."""
    status = process.wait(timeout=300)
    return status, (folder / "out").read_text(), (folder / "err").read_text()


@pytest.mark.slow
def test_a_store_that_is_deleted_under_a_run_is_read_to_the_end(tmp_path):
    fields = {"eval.every_epochs": 1000.0, "checkpoint.every_steps": 1000}  # only at the end
    command_line = train_command(tmp_path / "run", tmp_path / "data", steps=30, **fields)
    process = start_and_wait(command_line, tmp_path, 2)
    assert process.poll() is None  # it still trains
    shutil.rmtree(tmp_path / "data")
    status, summary, errors = wait_for_end(process, tmp_path)
    assert status == 0, errors
    assert json.loads(summary)["valid"]["n"] == SHRUNK["data.valid_size"]


@pytest.mark.slow
def test_a_store_that_is_cut_under_a_run_costs_no_checkpoint(tmp_path):
    data = tmp_path / "data"
    command_line = train_command(tmp_path / "run", data, steps=3000, **{"data.placement": "host"})
    process = start_and_wait(command_line, tmp_path, 5)
    (images,) = data.glob("store*/train/images.npy")
    with images.open("r+b") as file:
        file.truncate(4096)
    status, _, errors = wait_for_end(process, tmp_path)
    assert status == 1, errors
    assert f"failed: {images}: has become shorter since it was opened" in errors
    again = subprocess.run(command_line, capture_output=True, text=True)
    assert again.returncode == 2
    assert "images.npy: 4096 bytes, but its manifest says" in one_line(again.stderr)
    assert sorted((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_a_second_run_is_refused_and_repeated_signals_stop_the_first(data_dir, tmp_path):
    command_line = train_command(tmp_path / "run", data_dir, steps=3000)
    process = start_and_wait(command_line, tmp_path, 2)
    second = subprocess.run(command_line, capture_output=True, text=True)
    assert second.returncode == 2
    assert "another run writes there" in one_line(second.stderr)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    status, summary, errors = wait_for_end(process, tmp_path)
    assert status == 0, errors
    step = json.loads(summary)["step"]
    assert step < 3000
    assert (tmp_path / "run" / "checkpoints" / str(step) / "checksums.json").exists()


def test_other_patches_in_the_store_give_a_warning_on_resume(small_config, tmp_path, caplog):
    from bef_jax import train

    train.train_and_evaluate(small_config(), tmp_path / "run")
    config = small_config(steps=7, **{"data.dir": str(tmp_path / "data"), "data.seed": 1})
    store.prepare(config.data)
    with caplog.at_level("WARNING", logger="bef_jax"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert "other patches than when" in caplog.text
