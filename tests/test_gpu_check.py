"""Runs results/gpu_check.py small, on a CPU, so that it works when there is a GPU for a while."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bef_jax.config import validate

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "results" / "gpu_check.py"
ZERO = {"difference_from_native", "largest_relative_difference"}  # what may be 0


def environment_of(tmp_path, missing=()):
    """Returns the environment of a check that finds no GPU, and does not find some packages."""
    for name in missing:
        error = f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        (tmp_path / f"{name}.py").write_text(error)
    variables = {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    return os.environ | variables


def check(tmp_path, *flags, missing=()):
    """Runs the check small; returns its records by stage, and what it printed."""
    command = [sys.executable, SCRIPT, "run", "--tiny", f"--out={tmp_path / 'out'}", *flags]
    environment = environment_of(tmp_path, missing)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return records_of(tmp_path / "out"), result.stdout


def records_of(out):
    records = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {record["stage"]: record for record in records}


def figures(record):
    """Yields every number of a record with the key that is next to it."""
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        if isinstance(value, dict | list):
            yield from figures(value)
        elif isinstance(value, int | float):
            yield key, value


def assert_sound(record):
    assert not {"rc", "error"} & record.keys(), record
    for key, value in figures(record):
        assert math.isfinite(value)
        assert value > 0 or (key in ZERO and value == 0), (key, record)


@pytest.fixture
def gpu_check(tmp_path, monkeypatch):
    """Returns the module, with its logs in a folder of the test."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("gpu_check")
    monkeypatch.setattr(module, "SCRATCH", tmp_path)
    return module


@pytest.mark.slow
def test_speeds_are_measured_and_what_needs_timm_is_skipped(tmp_path):
    stages = "env,b3,timm_b3,micro"
    records, printed = check(tmp_path, f"--stages={stages}", missing=["timm"])
    assert ",".join(records) == stages
    peer = records.pop("timm_b3")
    assert peer["skipped"] == "timm is not installed"
    assert "rc" not in peer
    for record in records.values():
        assert_sound(record)
    assert {"copy_TBps", "matmul_TFLOPs", "call_us", "device"} <= records["env"].keys()
    b3 = records["b3"]
    assert b3["train"] == pytest.approx(1e3 * b3["batch"] / b3["step_ms"])
    assert {"infer", "peak_bytes", "compile_seconds", "profile"} <= b3.keys()
    assert len(b3["profile"]["slowest"]) == 12
    assert f"{b3['train']:,.0f}" in printed.splitlines()[-1]
    rows = records["micro"]["rows"]
    assert len(rows) == 2 * 3 * 2  # shapes, works, forms
    # Bfloat16 has 8 bits, so two forms of the same sum differ by less than 1 %, but they do differ.
    differences = [row["difference_from_native"] for row in rows if row["form"] == "shift"]
    assert 0 < max(differences) < 0.01
    assert len(list((tmp_path / "out").iterdir())) <= 8


@pytest.mark.slow
def test_losses_are_compared_and_the_tests_for_gpus_are_run(tmp_path):
    records, _ = check(tmp_path, "--stages=numeric")
    record = records["numeric"]
    assert_sound(record)
    ours, cpus = record["losses"]["here"], record["losses"]["cpu"]
    assert len(ours) == len(cpus) == 10
    assert ours == pytest.approx(cpus, rel=1e-4)
    assert record["largest_relative_difference"] < 1e-4
    assert " skipped" in record["tests"] or " passed" in record["tests"]
    assert "test_losses_are_those_of_the_cpu" in (tmp_path / "out" / "pytest.txt").read_text()


def test_a_package_that_every_machine_must_have_is_a_failure(tmp_path):
    records, _ = check(tmp_path, "--stages=micro,env", missing=["flax"])
    assert records["micro"]["rc"] == 1
    assert "No module named flax" in records["micro"]["error"]
    assert_sound(records["env"])  # the other stages go on


def test_a_stage_past_its_limit_is_cut_off_and_the_next_one_runs(tmp_path):
    start = time.monotonic()
    records, _ = check(tmp_path, "--stages=micro,env", "--limit=0.2")
    assert [record["rc"] for record in records.values()] == ["timeout", "timeout"]
    assert sum(record["wall"] for record in records.values()) < time.monotonic() - start


def test_without_time_no_stage_is_started(tmp_path):
    records, _ = check(tmp_path, "--stages=env,micro", "--seconds=10")
    assert {record["skipped"] for record in records.values()} == {"no time left"}


def runs(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie has ended, but nobody has asked for its status


def test_a_stage_that_is_cut_off_keeps_what_it_had_and_leaves_no_process(gpu_check):
    # Its child would hold a pipe open, and the last line is not whole.
    code = """if True:
        import subprocess, sys, time
        child = subprocess.Popen(["sleep", "60"])
        print('{"train": 1}\\n{"train": 2, "child": %d}\\n{"tra' % child.pid, end="", flush=True)
        print("why", file=sys.stderr, flush=True)
        time.sleep(60)
    """
    record = gpu_check.run_stage("slow", [sys.executable, "-IS", "-c", code], 5, {})
    child = record.pop("child")
    assert (record["train"], record["rc"], record["error"]) == (2, "timeout", "why\n")
    assert 5 <= record["wall"] < 50
    deadline = time.monotonic() + 10  # a killed process needs a moment to end
    while runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_stage_has_arguments_that_its_program_knows(gpu_check, monkeypatch):
    """CI does not run all of them."""
    from gpu_stages import __main__, speed

    names = [stage.name for stage in gpu_check.STAGES]
    assert len(set(names)) == len(names)
    for stage in gpu_check.STAGES:
        monkeypatch.setattr(sys, "argv", gpu_check.command_of(stage, "--out=out")[2:])
        options = __main__.parse_arguments()
        assert options.name == stage.name
        if options.stage == "bench":
            validate(speed.make_config(options))
        if options.stage == "warm":
            assert set(options.subject.split(",")) < set(names)


def test_a_stage_that_does_not_exist_is_a_mistake(tmp_path):
    command = [sys.executable, SCRIPT, "run", f"--out={tmp_path}", "--stages=env,b33"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, "unknown: b33" in result.stderr) == (2, True)


# ---- the shell script ---------------------------------------------------------------------------


def run_script(tmp_path, **variables):
    environment = environment_of(tmp_path) | {"OUT": str(tmp_path / "out"), **variables}
    environment["PYTHON"] = sys.executable
    command = ["bash", "results/gpu_check.sh", "60", "--tiny", "--stages=env"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "log.txt").read_text() == result.stdout
    return records_of(tmp_path / "out")["env"]


def test_the_script_goes_on_without_wheels(tmp_path):
    assert_sound(run_script(tmp_path, WHEELS=str(tmp_path / "nowhere")))


def test_the_script_installs_wheels_where_the_stages_find_them(tmp_path):
    pytest.importorskip("pip")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "triton-0.0.7-py3-none-any.whl", "w") as wheel:
        wheel.writestr("triton.py", "")
        folder = "triton-0.0.7.dist-info"
        wheel.writestr(
            f"{folder}/METADATA", "Metadata-Version: 2.1\nName: triton\nVersion: 0.0.7\n"
        )
        kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{folder}/WHEEL", kind)
        wheel.writestr(f"{folder}/RECORD", "")
    assert run_script(tmp_path, WHEELS=str(wheels))["versions"]["triton"] == "0.0.7"
