"""Starts real processes, because glibc reads its settings only when a process starts."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bef_jax.runtime import glibc

PROGRAM = """
import os, sys
from bef_jax.runtime import glibc
glibc.restart()
print(os.getpid(), sys.flags.safe_path, sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""
ROOT = Path(__file__).parents[2]
LINKER = Path("/lib64/ld-linux-x86-64.so.2")

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is not glibc")


def without_settings(**variables):
    """Returns the environment of a user who has set nothing."""
    inherited = {key: value for key, value in os.environ.items() if key != glibc.VARIABLE}
    return inherited | {"PYTHONPATH": str(ROOT)} | variables


def start(tmp_path, *flags, **variables):
    """Runs PROGRAM; returns the id of the process that was started, and what it printed."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, "-P", file, *flags],
        env=without_settings(**variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    printed, _ = process.communicate(timeout=60)
    return process.pid, printed.strip()


@needs_glibc
def test_a_program_starts_again_as_the_same_process_with_the_same_arguments(tmp_path):
    pid, printed = start(tmp_path, "--config=a b")
    cores = len(os.sched_getaffinity(0))
    assert printed == f"{pid} True ['--config=a b'] {glibc.settings(cores)}"


@pytest.mark.parametrize("value", ["glibc.malloc.arena_max=1", ""])
def test_a_users_own_settings_are_kept(value, tmp_path):
    pid, printed = start(tmp_path, GLIBC_TUNABLES=value)
    assert printed == f"{pid} True [] {value}".strip()


def unknown_name(name):
    raise ValueError(f"unrecognized configuration name: {name}")


@pytest.mark.parametrize("confstr", [lambda name: None, unknown_name])  # musl, macOS
def test_another_c_library_is_left_alone(confstr, monkeypatch):
    monkeypatch.delenv(glibc.VARIABLE, raising=False)
    monkeypatch.setattr(os, "confstr", confstr)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    glibc.restart()


@needs_glibc
@pytest.mark.skipif(not LINKER.exists(), reason="glibc's linker is elsewhere")
def test_glibc_knows_every_setting():
    shown = subprocess.run(
        [LINKER, "--list-tunables"],
        env={glibc.VARIABLE: glibc.settings(2)},
        capture_output=True,
        text=True,
        check=True,
    )
    values = dict(line.split(": ", 1) for line in shown.stdout.splitlines() if ": " in line)
    assert values["glibc.malloc.hugetlb"].startswith("0x1 ")
    assert values["glibc.malloc.arena_max"].startswith("0x3 ")
    assert values["glibc.malloc.mmap_threshold"].startswith("0x40000000 ")
    assert values["glibc.malloc.trim_threshold"].startswith("0x40000000 ")


@needs_glibc
@pytest.mark.parametrize(
    ("command", "starts"),
    [
        (["-m", "bef_jax.main"], [False, True]),
        (["-m", "bef_jax.main", "--nomemory_settings"], [False]),
        (["-m", "bef_jax.main", "--help"], [False]),
        (["-c", "import bef_jax.main, bef_jax.train"], [False]),
    ],
)
def test_a_program_starts_twice_and_a_library_once(command, starts, tmp_path):
    # Python imports this file whenever an interpreter starts.
    seen = tmp_path / "seen"
    note = "import os; print('GLIBC_TUNABLES' in os.environ, file=open({!r}, 'a'))"
    (tmp_path / "sitecustomize.py").write_text(note.format(str(seen)))
    environment = without_settings(PYTHONPATH=f"{tmp_path}:{ROOT}")
    subprocess.run([sys.executable, *command], env=environment, capture_output=True)
    assert seen.read_text().split() == [str(start) for start in starts]
