"""The command that trains the paper's table, with tiny runs; the table is compared with them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bef_jax.ablation import ablate
from bef_jax.ablation.cost import estimate
from bef_jax.config import flatten
from bef_jax.configs import ablation, densenet121, quickstart, resnet50
from bef_jax.errors import UserError
from bef_jax.planning.flops import training_flops
from tests.conftest import SHRUNK
from tests.special_files import BRACKETS, make_special

TINY = SHRUNK | {
    "steps": 2,
    "data.train_size": 24,
    "model.name": "efficientnet_test",
    "ablation.seeds": 2,
    "ablation.rows": ("baseline", "fusion"),
}


def command(workdir, data_dir, *flags, **fields):
    fields = TINY | {"data.dir": data_dir} | fields
    return [
        sys.executable, "-m", "bef_jax.main", "--config=configs/quickstart.py", "--mode=ablate",
        f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields.items()),
        *flags,
    ]  # fmt: skip


def run_main(*args, **fields):
    return subprocess.run(command(*args, **fields), capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("ablation")
    result = run_main(workdir, data_dir, **{"ablation.jobs": 2})
    assert result.returncode == 0, result.stderr
    return workdir, json.loads(result.stdout)


def test_each_row_changes_only_what_its_name_says(small_config, tmp_path):
    config = small_config(**{"ablation.seeds": 1})
    rows = {trial.row: flatten(trial.config) for trial in ablate.plan_trials(config, tmp_path)}
    assert list(rows) == list(ablation.ROWS)
    baseline = rows.pop("baseline")
    switches = {
        "rcc": {"rcc.enabled": True},
        "rds": {"model.total_stride": 16},
        "attention": {"model.attention": "cbam"},
        "fusion": {"model.fusion": True},
    }
    for name, switch in switches.items():
        differing = {key for key, value in rows[name].items() if value != baseline[key]}
        assert differing == {*switch, "name"}
        assert rows[name] | switch == rows[name]
    assert all(rows["all"] | switch == rows["all"] for switch in switches.values())


@pytest.mark.parametrize("file", [resnet50, densenet121])
def test_comparison_networks_are_those_of_their_files(file, small_config, tmp_path):
    name = file.get_config().model.name
    config = small_config(**{"ablation.seeds": 1, "ablation.rows": (name,)})
    (trial,) = ablate.plan_trials(config, tmp_path)
    assert flatten(trial.config.model) == flatten(file.get_config().model)


def test_trials_are_planned_seed_by_seed(small_config, tmp_path):
    fields = {"seed": 5, "ablation.seeds": 2, "ablation.rows": ("rds", "all")}
    trials = ablate.plan_trials(small_config(**fields), tmp_path)
    planned = [(trial.row, trial.seed) for trial in trials]
    assert planned == [("rds", 5), ("all", 5), ("rds", 6), ("all", 6)]
    assert trials[3].workdir == tmp_path / "all" / "seed6"


def test_an_unknown_row_is_refused(small_config, tmp_path):
    with pytest.raises(UserError, match=r"ablation\.rows.*'wings' is unknown: choose.*baseline"):
        ablate.plan_trials(small_config(**{"ablation.rows": ("wings",)}), tmp_path)


@pytest.fixture
def no_training(monkeypatch):
    """Fails a test in which the data are prepared, the first step of training."""
    monkeypatch.setattr(ablate, "prepare_with_progress", lambda _: pytest.fail("too late"))


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", BRACKETS])
@pytest.mark.parametrize("name", ["config.json", "train_summary.json"])
def test_a_damaged_file_of_a_row_is_named_before_any_row_is_trained(
    name, text, small_config, tmp_path
):
    file = tmp_path / "fusion" / "seed1" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(UserError, match=rf"{file}: damaged \(.*\); (move .* away|delete it)"):
        ablate.run_ablation(small_config(**{"ablation.seeds": 2}), tmp_path, [])


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("kind", ["FIFO", "folder"])
@pytest.mark.parametrize(
    "name", ["ablation.md", "ablation.png", "rcc/seed0/config.json", "rcc/seed0/train_summary.json",
             "rcc/seed0/log.txt", "rcc/seed0/scores_test.csv"],
)  # fmt: skip
def test_something_in_place_of_an_output_is_named_before_any_row_is_trained(
    name, kind, small_config, tmp_path
):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    make_special(kind, tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is in the way of an output file"):
        ablate.run_ablation(small_config(**{"ablation.seeds": 1}), tmp_path, [])


def test_the_last_error_is_found_in_a_long_log_of_any_bytes(small_config, tmp_path):
    (trial,) = ablate.plan_trials(
        small_config(**{"ablation.seeds": 1, "ablation.rows": ("rds",)}), tmp_path
    )
    trial.workdir.mkdir(parents=True)
    log = b"error: of an earlier start\n" + b"\xff" * (1 << 21) + b"\nerror: why\nmore\n"
    (trial.workdir / "log.txt").write_bytes(log)
    with pytest.raises(UserError, match=r"^rds, seed 0: why$"):
        ablate._result(trial, 2)


@pytest.mark.slow
def test_the_table_summarises_its_runs(finished):
    workdir, summary = finished
    assert (summary["runs"], summary["finished"], summary["split"]) == (4, 4, "test")
    for row in ("baseline", "fusion"):
        runs = [
            json.loads((workdir / row / f"seed{seed}" / "train_summary.json").read_text())
            for seed in (0, 1)
        ]
        aucs = [run["test"]["auc"] for run in runs]
        assert summary["rows"][row]["auc"] == pytest.approx(np.mean(aucs))
        assert summary["rows"][row]["auc_std"] == pytest.approx(abs(np.diff(aucs)[0]) / np.sqrt(2))
        assert runs[0]["params_digest"] != runs[1]["params_digest"]
    assert summary["rows"]["fusion"]["params"] > summary["rows"]["baseline"]["params"]
    assert all(os.path.getsize(file) for file in summary["files"])
    lines = list(csv.DictReader((workdir / "ablation_runs.csv").open(newline="")))
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("baseline", "0"), ("fusion", "0"), ("baseline", "1"), ("fusion", "1")
    ]  # fmt: skip


@pytest.mark.slow
def test_the_same_command_trains_nothing_again(finished, data_dir):
    workdir, summary = finished
    files = sorted(workdir.glob("*/*/train_summary.json"))
    before = [file.stat().st_mtime_ns for file in files]
    again = run_main(workdir, data_dir, log_every=2)  # a field that changes no figure of a run
    assert json.loads(again.stdout) | {"seconds": summary["seconds"]} == summary
    assert [file.stat().st_mtime_ns for file in files] == before


@pytest.mark.slow
def test_runs_of_another_configuration_are_not_mixed_in(finished, data_dir):
    workdir, _ = finished
    result = run_main(workdir, data_dir, **{"optim.learning_rate": 0.5})
    assert result.returncode == 2
    assert "was begun with config.optim.learning_rate=" in result.stderr
    assert "another --workdir" in result.stderr


@pytest.mark.slow
def test_a_dry_run_counts_what_is_missing_and_trains_nothing(finished, data_dir, small_config):
    workdir, _ = finished
    more = {"ablation.seeds": 3, "ablation.rows": ("baseline", "fusion", "rds")}
    summary = json.loads(run_main(workdir, data_dir, "--dry-run", **more).stdout)
    assert (summary["runs"], summary["finished"]) == (9, 4)
    rows = summary["rows"]
    assert [rows[row]["images"] for row in more["ablation.rows"]] == [16, 16, 48]
    wall_seconds = [
        json.loads((workdir / "baseline" / seed / "train_summary.json").read_text())["wall_seconds"]
        for seed in ("seed0", "seed1")
    ]
    # The speed is the median of the two runs' speeds, which is their mean.
    assert rows["baseline"]["seconds"] == pytest.approx(16 / np.mean(np.divide(16, wall_seconds)))
    # There is no run of rds, so its time is the baseline's, scaled by the arithmetic.
    ratio = rows["rds"]["training_flops_per_image"] / rows["baseline"]["training_flops_per_image"]
    assert rows["rds"]["seconds"] == pytest.approx(3 * rows["baseline"]["seconds"] * ratio)
    assert not (workdir / "rds").exists()


def test_without_a_run_the_time_is_not_guessed(small_config, tmp_path):
    trials = ablate.plan_trials(small_config(**{"ablation.rows": ("baseline", "rds")}), tmp_path)
    found = estimate(trials, 40)
    assert found["seconds"] is None and found["rows"]["rds"]["seconds"] is None
    flops = [row["training_flops_per_image"] for row in found["rows"].values()]
    assert flops == [training_flops(trial.config) for trial in trials[:2]]


@pytest.mark.slow
def test_a_signal_saves_the_run_and_the_same_command_resumes_it(tmp_path, data_dir):
    fields = {"steps": 100, "ablation.rows": ("baseline",), "ablation.seeds": 1}
    fields |= {"checkpoint.every_steps": 1000, "eval.every_epochs": 1000.0}
    log = tmp_path / "baseline" / "seed0" / "metrics.jsonl"
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command(tmp_path, data_dir, **fields), stdout=out)
        while process.poll() is None and not (log.exists() and log.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
    assert json.loads((tmp_path / "out").read_text())["finished"] == 0
    assert list((tmp_path / "baseline" / "seed0" / "checkpoints").glob("[0-9]*"))
    summary = json.loads(run_main(tmp_path, data_dir, **fields).stdout)
    assert summary["finished"] == 1
    assert "resuming" in (tmp_path / "baseline" / "seed0" / "log.txt").read_text()


def test_an_error_of_a_run_reaches_the_user_in_one_line(tmp_path, data_dir):
    result = run_main(tmp_path, data_dir, **{"init_from": tmp_path / "nowhere"})
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: baseline, seed 0: ") and "nowhere" in line


def test_what_a_store_filled_in_is_no_change(tmp_path):
    config = quickstart.get_config()
    trial = ablate.Trial("plain", 0, tmp_path, config, {})
    saved = json.loads(config.to_json_best_effort())
    saved["data"] |= {"classes": ["a", "b"], "mpp": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    ablate.check_unchanged(trial)
    config.data.classes = ("b", "a")
    with pytest.raises(UserError, match=r"was begun with config\.data\.classes=\['a', 'b'\]"):
        ablate.check_unchanged(trial)
