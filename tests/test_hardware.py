import jax
import pytest

from bef_jax import hardware

CPUINFO = "processor\t: 0\nmodel name\t: {}\n\nprocessor\t: 1\nmodel name\t: Other\n"


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel(R) Xeon(R) CPU @ 2.20GHz: X"])
def test_cpu_model_is_the_first_processors(name, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format(name))
    assert hardware.cpu_model(file) == name


def test_cpu_model_falls_back_to_the_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.platform, "machine", lambda: "arm64")
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 48.00\n")
    assert hardware.cpu_model(tmp_path / "arm") == "arm64"
    assert hardware.cpu_model(tmp_path / "nowhere") == "arm64"


@pytest.mark.parametrize(("count", "name"), [(1, "NVIDIA L4"), (8, "8 x NVIDIA L4")])
def test_accelerators_are_counted(count, name, monkeypatch):
    device = type("Device", (), {"device_kind": "NVIDIA L4"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device] * count)
    monkeypatch.setattr(jax, "device_count", lambda: count)
    assert hardware.describe() == name


@pytest.mark.parametrize(("cores", "end"), [({0}, "EPYC, 1 core"), ({0, 3}, "EPYC, 2 cores")])
def test_cores_are_those_that_the_process_may_use(cores, end, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(hardware, "cpu_model", lambda: "AMD EPYC")
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: cores, raising=False)
    assert hardware.describe() == f"AMD {end}"


def test_a_peak_is_never_a_guess():
    assert hardware.peak_flops("NVIDIA L4", "bfloat16") == 121e12
    assert hardware.peak_flops("NVIDIA L40S", "bfloat16") is None
    assert hardware.peak_flops("NVIDIA L4", "float32") is None
    assert hardware.peak_flops("cpu", "bfloat16") is None


@pytest.mark.parametrize(
    ("line", "limits", "bytes_allowed"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1024"}, 1024),
        ("0::/a/b", {"a/b/memory.max": "512", "a/memory.max": "1024"}, 512),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": "2048"}, 2048),
        ("1:cpu:/a", {"cpu/memory.limit_in_bytes": "2048"}, None),  # of another controller
        ("0::/a", {"a/memory.max": str(2**60)}, None),  # more than there is
    ],
)
def test_memory_is_what_the_cgroup_allows(line, limits, bytes_allowed, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    for name, text in limits.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    machine = hardware.ram(tmp_path / "elsewhere")
    assert machine > 2**28
    assert hardware.ram(tmp_path) == (bytes_allowed or machine)
