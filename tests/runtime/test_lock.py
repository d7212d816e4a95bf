"""The lock of a workdir, while another process holds it and after that process was killed."""

import signal
import subprocess
import sys

import pytest

from bef_jax.errors import UserError
from bef_jax.runtime import lock

HOLD = """
import sys, time
from pathlib import Path
from bef_jax.runtime import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Yields another process, which holds the lock of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_while_the_first_lives(owner, tmp_path):
    refused = pytest.raises(UserError, match=r"another run writes there; .*--workdir")
    with refused, lock.held(tmp_path):
        pytest.fail("two runs hold the lock")


def test_a_killed_run_does_not_keep_the_lock(owner, tmp_path):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with lock.held(tmp_path):
        pass


def test_the_lock_ends_with_the_run_that_failed(tmp_path):
    with pytest.raises(FloatingPointError), lock.held(tmp_path):
        raise FloatingPointError
    with lock.held(tmp_path):
        pass


def test_a_workdir_that_is_a_file_gives_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), lock.held(tmp_path / "file"):
        pass
