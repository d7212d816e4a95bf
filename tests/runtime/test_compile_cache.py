"""The cache of compiled programs: new processes compile, and the tests look at its files."""

import os
import platform
import re
import subprocess
import sys

import pytest

from tests.conftest import train_command

PROGRAM = """
import logging, os, sys

if sys.argv[2:]:
    os.sched_setaffinity(0, map(int, sys.argv[2:]))  # before JAX starts a thread for each core
import jax, jax.numpy as jnp
from bef_jax.runtime import compile_cache

logging.basicConfig()
compile_cache.enable(sys.argv[1])
x = jnp.ones((64, 64))
def slow_to_compile(x):
    for n in range(100):
        x = jnp.sin(x @ x + n)
    return x
jax.jit(slow_to_compile).lower(x).compile()
"""


def compile_in_a_process(setting, home, cores=(), **environment):
    """Runs PROGRAM, on `cores` if given; returns its stderr."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(setting), *map(str, cores)],
        env=inherited | {"HOME": str(home), "XDG_CACHE_HOME": ""} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def entries(folder):
    return sorted(path.name for path in folder.rglob("*slow_to_compile*"))


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    hit = "compilation cache hit for 'jit_slow_to_compile'"
    assert hit not in compile_in_a_process("auto", tmp_path, JAX_LOG_COMPILES="1")
    folder = tmp_path / ".cache" / "bef_jax"
    found = entries(folder)
    assert len(found) == 1
    assert hit in compile_in_a_process("auto", tmp_path, JAX_LOG_COMPILES="1")
    assert entries(folder) == found


def test_auto_respects_xdg_cache_home(tmp_path):
    compile_in_a_process("auto", tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert entries(tmp_path / "xdg" / "bef_jax")
    assert not (tmp_path / ".cache").exists()


def test_a_folder_in_the_setting_is_used(tmp_path):
    compile_in_a_process(tmp_path / "mine", tmp_path)
    assert entries(tmp_path / "mine")


def test_an_empty_setting_switches_the_cache_off(tmp_path):
    compile_in_a_process("", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_variables_of_jax_override_the_setting(tmp_path):
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    compile_in_a_process(tmp_path / "mine", tmp_path, **environment)
    assert entries(tmp_path / "jax")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("setting", ["auto", "~/file/folder"])
def test_a_folder_that_cannot_be_written_gives_one_line_of_warning(setting, tmp_path):
    (tmp_path / "file").write_text("in the way")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    stderr = compile_in_a_process(setting, tmp_path, **environment)
    (line,) = stderr.splitlines()
    assert "config.compile_cache" in line
    assert str(tmp_path / "file") in line


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process can't choose cores")
def test_a_program_that_one_core_compiled_is_not_used_on_two(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        pytest.skip("needs two cores")
    for count in (1, 2, 1):
        compile_in_a_process("auto", tmp_path, cores[:count])
    assert len(entries(tmp_path)) == 2


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86 CPU")
def test_another_kind_of_cpu_compiles_for_itself(tmp_path):
    """Machines can share a home folder, because the key of an entry holds a hash of the CPU."""

    def hash_of_cpu(*flags):
        environment = {"JAX_DEBUG_LOG_MODULES": "jax._src.cache_key", "XLA_FLAGS": " ".join(flags)}
        stderr = compile_in_a_process("auto", tmp_path, **environment)
        return re.search(r"hash of serialized accelerator_config: (\w+)", stderr)[1]

    native = hash_of_cpu()
    assert native == hash_of_cpu()
    assert native != hash_of_cpu("--xla_cpu_max_isa=SSE4_2")


@pytest.mark.slow
def test_a_longer_run_at_another_rate_finds_the_step_of_the_first(tmp_path, data_dir):
    folder = tmp_path / "cache"

    def steps_after(name, **fields):
        command = train_command(tmp_path / name, data_dir, **fields)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder)}
        subprocess.run(command, env=environment, capture_output=True, check=True)
        return sorted(path.name for path in folder.glob("jit_call-*-cache"))

    found = steps_after("first", steps=2)
    assert len(found) == 1
    fields = {"optim.learning_rate": 0.02, "optim.warmup_epochs": 0.2, "optim.final_fraction": 0.5}
    assert steps_after("second", steps=3, **fields, **{"data.train_size": 32}) == found
    assert len(steps_after("third", steps=2, label_smoothing=0.1)) == 2  # so that it can fail
