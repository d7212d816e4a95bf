"""Runs the launch scripts with fake programs, which record how they are called."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
STOPPED = '{"mode": "train", "step": 3, "valid": null}'
DONE = '{"mode": "train", "step": 9, "valid": {"auc": 0.9}}'


@pytest.fixture
def run(tmp_path):
    """Returns run(command, fakes, **environment) -> (stdout, what the fakes were called with)."""
    calls = tmp_path / "calls"

    def fake(name, body):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\nprintf "%s " {name} "$@" >>{calls}\necho >>{calls}\n{body}\n'
        )
        program.chmod(0o755)

    def run(command, fakes=None, status=0, **environment):
        calls.write_text("")
        for name, body in (fakes or {}).items():
            fake(name, body)
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == status, result.stderr
        return result.stdout, calls.read_text().splitlines()

    return run


def bash(script, *arguments):
    return ["bash", str(LAUNCH / script), *arguments]


# ---- this machine -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "last"),
    [
        (
            ["train", "--config.name=a b"],
            "-P -m bef_jax.main --config={quickstart} '--config.name=a b'",
        ),
        (["train", "--config=configs/b2.py"], "-P -m bef_jax.main --config=configs/b2.py"),
        (["test", "-k", "store"], "-m pytest -k store"),
        (["test"], "-m pytest -n logical --maxprocesses=8 --dist worksteal"),
    ],
)
def test_local_dry_run_prints_the_set_up_and_the_command_and_makes_nothing(
    mode, last, run, tmp_path
):
    venv = tmp_path / "new" / "venv"
    printed, _ = run(bash("local.sh", "--dry-run", *mode), BEF_VENV=str(venv))
    lines = [shlex.split(line) for line in printed.splitlines()]
    assert lines[0][1:] == ["-m", "venv", str(venv)]
    assert lines[1][:4] == [str(venv / "bin" / "python"), "-m", "pip", "install"]
    quickstart = LAUNCH.parent / "configs" / "quickstart.py"
    python, *flags = lines[-1]
    assert python == str(venv / "bin" / "python")
    assert flags == shlex.split(last.format(quickstart=quickstart))
    assert not venv.parent.exists()


def extras(printed):
    """Returns the extras of the package that the printed pip command would install."""
    (command,) = [line for line in map(shlex.split, printed.splitlines()) if "pip" in line]
    return command[-1].removeprefix(str(LAUNCH.parent))


@pytest.mark.parametrize(
    ("node", "mode", "installed"),
    [
        ("/dev/nvidia0", "train", "[cuda]"),
        ("/dev/nvidiactl", "test", "[dev,cuda]"),
        ("/proc/driver/nvidia", "setup", "[cuda]"),
        ("/dev/dxg", "train", "[cuda]"),
        ("/dev/accel0", "test", "[dev,tpu]"),
        ("/dev/vfio/0", "train", ""),  # VFIO passes on a device that is not Google's
        ("", "train", ""),
        ("", "test", "[dev]"),
    ],
)
def test_local_installs_for_the_device_that_is_there(node, mode, installed, run, tmp_path):
    fakes = {"ls": f"[ -z '{node}' ] || echo {node}", "cat": "echo 0x10de"}
    printed, _ = run(bash("local.sh", "--dry-run", mode), fakes, BEF_VENV=str(tmp_path / "venv"))
    assert extras(printed) == installed


def test_local_finds_a_tpu_behind_vfio(run, tmp_path):
    fakes = {"ls": "echo /dev/vfio/0", "cat": "echo 0x8086; echo 0x1ae0"}
    dry = bash("local.sh", "--dry-run", "setup")
    assert extras(run(dry, fakes, BEF_VENV=str(tmp_path / "venv"))[0]) == "[tpu]"


def test_local_takes_another_device_by_name(run, tmp_path):
    fakes, venv = {"ls": "echo /dev/nvidia0"}, str(tmp_path / "venv")
    dry = bash("local.sh", "--dry-run", "--device=cuda13", "train")
    assert extras(run(dry, fakes, BEF_VENV=venv)[0]) == "[cuda13]"
    printed, _ = run(bash("local.sh", "--dry-run", "--device=cpu", "train"), fakes, BEF_VENV=venv)
    assert extras(printed) == ""
    # Without JAX_PLATFORMS, a plug-in that is installed already would still use the GPU.
    assert shlex.split(printed.splitlines()[-1])[:2] == ["env", "JAX_PLATFORMS=cpu"]
    run(bash("local.sh", "--dry-run", "--device=gpu", "train"), status=2, BEF_VENV=venv)


def test_local_makes_the_environment_again_after_a_set_up_was_cut_short(run, tmp_path):
    (tmp_path / "venv.setup").write_text("under way")
    printed, _ = run(bash("local.sh", "--dry-run", "test"), BEF_VENV=str(tmp_path / "venv"))
    assert shlex.split(printed.splitlines()[0])[1:4] == ["-m", "venv", "--clear"]
    assert (tmp_path / "venv.setup").read_text() == "under way"


def python_of_the_set_up(run, tmp_path, fakes, **environment):
    script = bash("local.sh", "--dry-run", "test")
    printed, _ = run(script, fakes, BEF_VENV=str(tmp_path / "venv"), **environment)
    return shlex.split(printed)[0]


def test_local_takes_the_first_usable_python(run, tmp_path):
    fakes = {"python3.11": "exit 127", "python3.12": "exit 1", "python3.13": ""}
    assert python_of_the_set_up(run, tmp_path, fakes) == "python3.13"


def test_local_takes_only_the_given_python(run, tmp_path):
    (tmp_path / "a b").mkdir()
    given = tmp_path / "a b" / "python"
    given.symlink_to(sys.executable)
    fakes = {"python3.11": ""}
    assert python_of_the_set_up(run, tmp_path, fakes, BEF_PYTHON=str(given)) == str(given)
    run(bash("local.sh", "--dry-run", "test"), status=1, BEF_PYTHON="nowhere/python", BEF_VENV="x")


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), 1), ((3, 11), 0), ((3, 14), 0), ((3, 15), 1)]
)
def test_local_takes_only_supported_versions_of_python(version, status, run, tmp_path):
    # A fake Python of this version, which runs the script's own check.
    ask = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    body = f'[ "$1" != -c ] || exec {sys.executable} -c "{ask}" "$2"'
    fakes = {"fake-python": body}
    script = bash("local.sh", "--dry-run", "test")
    run(script, fakes, status, BEF_PYTHON="fake-python", BEF_VENV=str(tmp_path / "venv"))


# ---- Cloud TPU ----------------------------------------------------------------------------------

TPU_STEPS = [
    ["create"],
    ["run", "--config=configs/b2.py", "--config.name=a b"],
    ["fetch"],
    ["delete"],
]


@pytest.mark.parametrize("step", TPU_STEPS, ids=lambda step: step[0])
def test_tpu_dry_run_prints_what_would_run_and_runs_nothing(step, run):
    script, fakes = bash("tpu_vm.sh", *step), {"gcloud": "exit 1"}
    dry = bash("tpu_vm.sh", "--dry-run", *step)
    printed, called = run(dry, fakes, ZONE="us-west4-a")
    assert not called
    fakes = {"gcloud": f'[ "$4" != describe ] || exit {int(step[0] == "create")}'}
    _, called = run(script, fakes, ZONE="us-west4-a", WORKDIR="runs/bef-jax")
    ran = [line for line in called if " describe " not in line]
    planned = [" ".join(shlex.split(line)) + " " for line in printed.splitlines()]
    assert ran == "\n".join(line for line in planned if not line.startswith("mkdir")).splitlines()


def test_tpu_hosts_find_each_other_by_themselves(run):
    dry = bash("tpu_vm.sh", "--dry-run", "run", "--config.name=a b")
    (command,) = map(shlex.split, run(dry, ZONE="us-west4-a")[0].splitlines())
    assert "--worker=all" in command
    remote = shlex.split(command[-1].removeprefix("--command="))
    assert "--config.distributed.coordinator=auto" in remote
    assert remote[-1] == "--config.name=a b"


def test_tpu_create_and_delete_may_be_repeated(run):
    there, gone = {"gcloud": ""}, {"gcloud": '[ "$4" != describe ]'}
    _, called = run(bash("tpu_vm.sh", "create"), there, ZONE="us-west4-a")
    assert not any(" create " in line for line in called)
    _, called = run(bash("tpu_vm.sh", "delete"), gone, ZONE="us-west4-a")
    assert not any(" delete " in line for line in called)


def test_tpu_needs_a_zone(run):
    run(bash("tpu_vm.sh", "--dry-run", "create"), status=1)


# ---- SLURM --------------------------------------------------------------------------------------


def test_slurm_dry_run_prints_the_submission_and_submits_nothing(run):
    flags = ["--config=configs/b2.py", "--config.name=a b"]
    fakes = {"sbatch": ""}
    job = {"NODES": "4", "GPUS": "2", "VENV": "mine"}
    printed, called = run(bash("slurm.sh", "--dry-run", *flags), fakes, **job)
    assert not called
    _, (submitted,) = run(bash("slurm.sh", *flags), fakes, **job)
    assert submitted.split() == " ".join(shlex.split(printed)).split()
    assert {"--nodes=4", "--ntasks-per-node=2", "--requeue"} <= set(submitted.split())


@pytest.mark.parametrize(
    ("device", "installed"), [({}, "[cuda]"), ({"DEVICE": "cuda13"}, "[cuda13]")]
)
def test_slurm_sets_up_for_the_gpus_of_the_nodes(device, installed, run, tmp_path):
    fakes, venv = {"ls": "", "sbatch": ""}, str(tmp_path / "venv")
    printed, _ = run(bash("slurm.sh", "--dry-run"), fakes, BEF_VENV=venv, **device)
    assert extras(printed) == installed
    assert printed.splitlines()[-1].startswith("sbatch ")


@pytest.mark.parametrize(("summary", "again"), [(STOPPED, True), (DONE, False)])
def test_slurm_queues_a_stopped_run_again(summary, again, run, tmp_path):
    fakes = {"srun": f"echo '{summary}'", "scontrol": ""}
    job = {"BEF_ROOT": str(tmp_path), "SLURM_JOB_ID": "7"}
    _, (task, *rest) = run(bash("slurm.sh", "--config=x"), fakes, **job)
    assert task.endswith("-m bef_jax.main --config=x ")
    assert rest == (["scontrol requeue 7 "] if again else [])


def test_slurm_reports_a_failure_and_does_not_try_again(run, tmp_path):
    fakes = {"srun": "exit 2", "scontrol": ""}
    job = {"BEF_ROOT": str(tmp_path), "SLURM_JOB_ID": "7"}
    _, called = run(bash("slurm.sh"), fakes, status=2, **job)
    assert len(called) == 1


# ---- GKE ----------------------------------------------------------------------------------------


def pods():
    spec = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    (job,) = spec["spec"]["replicatedJobs"]
    return spec["metadata"]["name"], job["name"], job["template"]["spec"]


def test_gke_pods_connect_to_the_first_one():
    name, job, spec = pods()
    (container,) = spec["template"]["spec"]["containers"]
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    prefix = "config.distributed."
    assert flags[f"{prefix}coordinator"].startswith(f"{name}-{job}-0-0.{name}:")
    assert int(flags[f"{prefix}num_processes"]) == spec["completions"] == spec["parallelism"]
    assert flags[f"{prefix}process_id"] == "$(JOB_COMPLETION_INDEX)"
    assert spec["completionMode"] == "Indexed"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("body", "status"), [(f"echo '{STOPPED}'", 1), (f"echo '{DONE}'", 0), ("exit 2", 2), ("", 0)]
)
def test_gke_pod_of_a_stopped_run_fails_so_that_the_set_starts_again(body, status, run):
    (container,) = pods()[2]["template"]["spec"]["containers"]
    command = [*container["command"], "--config=x"]
    _, (called,) = run(command, {"python": body}, status=status)
    assert called == "python -m bef_jax.main --config=x "


def test_gke_pod_passes_the_signal_on(run, tmp_path):
    (container,) = pods()[2]["template"]["spec"]["containers"]
    stop = f"stop() {{ echo '{STOPPED}'; exit 0; }}; trap stop TERM"
    body = f"{stop}; kill $PPID; while :; do sleep 0.05; done"
    run(container["command"], {"python": body}, status=1)


def test_gke_pod_that_is_stopped_early_starts_no_run(run, tmp_path):
    (container,) = pods()[2]["template"]["spec"]["containers"]
    fakes = {"mktemp": f"kill $PPID; echo {tmp_path}/summary", "python": f"echo '{DONE}'"}
    _, called = run(container["command"], fakes, status=1)
    assert called == ["mktemp "]


# ---- all scripts --------------------------------------------------------------------------------


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck(run):
    root = LAUNCH.parent
    scripts = [*LAUNCH.glob("*.sh"), root / ".ci/run", root / ".ci/smoke"]
    run([SHELLCHECK, *map(str, [*scripts, root / "results/gpu_check.sh"])])
