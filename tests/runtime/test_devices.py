"""What a run says of its devices; a machine is a folder, with plain files as device nodes."""

import importlib.util
import logging
import os
import subprocess
import sys

import jax
import jaxlib
import pytest

from bef_jax.errors import RunError
from bef_jax.runtime import devices


@pytest.fixture
def reported(caplog, monkeypatch):
    """Returns reported(...): the lines of devices.report(...) if no platform was chosen."""
    caplog.set_level(logging.INFO, logger="bef_jax")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "cpu_model", lambda: "AMD EPYC")
    monkeypatch.setattr(devices, "cores", lambda: 2)
    monkeypatch.setattr(devices, "ram", lambda: 3 * 2**29)
    chosen = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)

    def reported(*arguments):
        caplog.clear()
        devices.report(*arguments)
        return caplog.messages

    yield reported
    jax.config.update("jax_platforms", chosen)


def make_files(root, *names):
    """Makes files below `root`, whose text is Google's number on the PCI bus; returns `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("0x1ae0\n")
    return root


def test_a_run_says_what_it_runs_on(reported, tmp_path):
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    (line,) = reported(True, tmp_path)
    assert line == f"running on AMD EPYC, 2 cores, 1.5 GiB (cpu, {versions})"


def test_jax_is_not_asked_for_devices_that_others_need(reported, tmp_path, monkeypatch):
    for name in ("default_backend", "devices", "local_devices", "device_count"):
        monkeypatch.setattr(jax, name, lambda *_: pytest.fail("JAX was asked"))
    (line,) = reported(False, make_files(tmp_path, "dev/nvidia0"))
    assert line.startswith("running on AMD EPYC, 2 cores, 1.5 GiB (jax ")


@pytest.mark.parametrize(
    ("stats", "memory"), [({"bytes_limit": 60 * 2**30}, ", 60.0 GiB each"), (None, ""), ({}, "")]
)
def test_the_memory_of_accelerators_is_shown(stats, memory, reported, tmp_path, monkeypatch):
    device = type("Device", (), {"device_kind": "NVIDIA L4", "memory_stats": lambda self: stats})()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [device] * 8)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    (line,) = reported(True, make_files(tmp_path, "dev/nvidia0"))
    assert line.startswith(f"running on 8 x NVIDIA L4{memory} (gpu, jax ")


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (["dev/nvidia0"], ["an NVIDIA GPU", "dev/nvidia0", "pip install", "[cuda]"]),
        (["dev/nvidiactl"], ["an NVIDIA GPU", "[cuda]"]),
        (["proc/driver/nvidia/version"], ["an NVIDIA GPU", "[cuda]"]),
        (["dev/dxg"], ["an NVIDIA GPU", "[cuda]"]),
        (["dev/accel0"], ["a TPU", "dev/accel0", "pip install", "[tpu]"]),
        (["dev/vfio/0", "sys/bus/pci/devices/1/vendor"], ["a TPU", "dev/vfio/0", "[tpu]"]),
        (["dev/vfio/0"], None),  # a device of another maker, passed on to a virtual machine
        (["sys/bus/pci/devices/1/vendor"], None),  # without a driver, JAX could not open it
        (["dev/null"], None),
    ],
)
def test_an_unused_accelerator_is_named_with_what_to_install(
    nodes, words, reported, tmp_path, monkeypatch
):
    # This machine may have a plug-in.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, *warnings = reported(True, make_files(tmp_path, *nodes))
    if words is None:
        assert not warnings
    else:
        (line,) = warnings
        assert all(word in line for word in words), line


def test_a_user_who_chose_the_cpu_gets_no_advice(reported, tmp_path):
    jax.config.update("jax_platforms", "cpu")
    (line,) = reported(True, make_files(tmp_path, "dev/nvidia0"))
    assert line.startswith("running on AMD EPYC")


def test_a_plug_in_that_is_installed_is_not_advised(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    line = devices.advice(make_files(tmp_path, "dev/nvidia0"))
    assert "the plug-in jax_cuda13_plugin is installed" in line
    assert "pip install" not in line


def test_devices_that_do_not_start_give_one_line_of_error(monkeypatch):
    def refuse():
        raise RuntimeError("Unable to initialize backend 'cuda':\n no driver")

    monkeypatch.setattr(jax, "default_backend", refuse)
    with pytest.raises(RunError, match=r"JAX can't start: Unable .* 'cuda': no driver$"):
        devices.report()


def test_the_reason_why_a_plug_in_fails_is_shown(tmp_path):
    """Runs the whole program with a plug-in that JAX finds as it finds NVIDIA's."""
    failing = 'def initialize():\n    raise RuntimeError("the driver is\\ntoo old")\n'
    (tmp_path / "failing.py").write_text(failing)
    installed = tmp_path / "failing-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[jax_plugins]\nfailing = failing\n")
    flags = ["--config=b0", "--mode=import_weights", f"--workdir={tmp_path / 'run'}"]
    result = subprocess.run(
        [sys.executable, "-m", "bef_jax.main", *flags],
        env=os.environ | {"PYTHONPATH": f"{os.getcwd()}:{tmp_path}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    reason, line, error = result.stderr.splitlines()
    assert reason.endswith("failing.initialize(): RuntimeError: the driver is too old")
    assert line.startswith("running on ")
    assert error.startswith("error: ")


# ---- names and sizes ---------------------------------------------------------------------------


CPUINFO = "processor\t: 0\nmodel name\t: {}\n\nprocessor\t: 1\nmodel name\t: Other\n"


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel(R) Xeon(R) CPU @ 2.20GHz: X"])
def test_cpu_model_is_the_first_processors(name, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format(name))
    assert devices.cpu_model(file) == name


def test_cpu_model_falls_back_to_the_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 48.00\n")
    assert devices.cpu_model(tmp_path / "arm") == "arm64"
    assert devices.cpu_model(tmp_path / "nowhere") == "arm64"


@pytest.mark.parametrize(("count", "name"), [(1, "NVIDIA L4"), (8, "8 x NVIDIA L4")])
def test_accelerators_are_counted(count, name, monkeypatch):
    device = type("Device", (), {"device_kind": "NVIDIA L4"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device] * count)
    monkeypatch.setattr(jax, "device_count", lambda: count)
    assert devices.describe() == name


@pytest.mark.parametrize(("cores", "end"), [({0}, "EPYC, 1 core"), ({0, 3}, "EPYC, 2 cores")])
def test_cores_are_those_that_the_process_may_use(cores, end, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(devices, "cpu_model", lambda: "AMD EPYC")
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: cores, raising=False)
    assert devices.describe() == f"AMD {end}"


@pytest.mark.parametrize(
    ("line", "limits", "bytes_allowed"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1024"}, 1024),
        ("0::/a/b", {"a/b/memory.max": "512", "a/memory.max": "1024"}, 512),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": "2048"}, 2048),
        ("1:cpu:/a", {"cpu/memory.limit_in_bytes": "2048"}, None),  # of another controller
        ("0::/a", {"a/memory.max": str(2**60)}, None),  # more than the machine has
    ],
)
def test_memory_is_what_the_cgroup_allows(line, limits, bytes_allowed, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    for name, text in limits.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    machine = devices.ram(tmp_path / "elsewhere")
    assert machine > 2**28
    assert devices.ram(tmp_path) == (bytes_allowed or machine)
