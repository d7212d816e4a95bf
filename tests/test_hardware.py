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
