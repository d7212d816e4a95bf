"""What a checkpoint decides, and what those who score with it may change."""

import json
import logging
import os
import subprocess
import sys

import pytest

from bef_jax import evaluate
from bef_jax.errors import UserError
from bef_jax.scoring import trained
from bef_jax.training import checkpoint


@pytest.fixture
def run_summary(request):
    """The summary of the run in `workdir`; `trained` is the module's name here."""
    return request.getfixturevalue("trained")


def test_a_workdir_means_its_best_checkpoint_and_a_checkpoint_itself(run_summary, workdir):
    best = checkpoint.best(workdir)
    assert trained.find(workdir) == trained.find(best) == best.resolve()
    older = workdir / "checkpoints" / "3"
    assert trained.find(str(older)) == older.resolve()
    assert trained.workdir_of(older) == workdir


def test_without_a_checkpoint_nothing_is_found(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there; train first"):
        trained.find(tmp_path)


def test_all_that_decides_a_score_comes_from_the_checkpoint(
    run_summary, scoring, small_config, caplog
):
    other = {
        "rcc.eval_size": 96,
        "eval.tta": 8,
        "eval.threshold": 0.9,
        "augment.mean": (0.1, 0.2, 0.3),
        "model.total_stride": 32,
        "model.padding": "symmetric",
        "eval.batch_size": 5,
        "data.dir": "elsewhere",
    }
    saved, path = scoring()
    with caplog.at_level(logging.INFO, logger="bef_jax"):
        config = trained.scoring_config(path, small_config(**other))
    assert (config.eval.batch_size, config.data.dir) == (5, "elsewhere")
    config.update(eval=saved.eval, data=saved.data)
    assert config.to_json_best_effort() == saved.to_json_best_effort()
    assert (saved.rcc.eval_size, saved.eval.tta, saved.eval.threshold) == (48, 1, 0.5)
    told = {line.split("=")[0] for line in caplog.messages if "the checkpoint decides" in line}
    assert told == {f"config.{name}" for name in other} - {"config.eval.batch_size",
                                                           "config.data.dir"}  # fmt: skip


def test_a_change_on_purpose_counts_and_is_logged(run_summary, scoring, caplog):
    changes = {"rcc.eval_size": 64, "eval.threshold": 0.25, "augment.mean": (0.5, 0.5, 0.5)}
    with caplog.at_level(logging.INFO, logger="bef_jax"):
        config, _ = scoring(**changes, **{"eval.batch_size": 3})
    assert (config.rcc.eval_size, config.eval.threshold, config.eval.batch_size) == (64, 0.25, 3)
    assert [line for line in caplog.messages if "the checkpoint has" in line] == [
        "config.augment.mean=[0.5, 0.5, 0.5]; the checkpoint has [0.7, 0.54, 0.69]",
        "config.eval.threshold=0.25; the checkpoint has 0.5",
        "config.rcc.eval_size=64; the checkpoint has 48",
    ]


def test_another_network_is_refused_and_the_same_one_is_not(run_summary, scoring):
    scoring(**{"model.fusion": True, "model.depthwise": "native", "model.remat": "block"})
    with pytest.raises(UserError, match=r"model\.fusion=True: leave out --config\.model\.fusion"):
        scoring(**{"model.fusion": False})


def test_flags_of_training_are_nothing_to_scoring(run_summary, scoring):
    """Whoever repeats the flags of the run, or has others for the next one, scores all the same."""
    config, path = scoring(**{"ema_decay": 0.0, "optim.name": "sgd", "steps": 7})
    assert config.ema_decay == checkpoint.read_metadata(path)["config"]["ema_decay"] > 0
    assert evaluate.evaluate_checkpoint(config, path, "valid")["loss"] == pytest.approx(
        run_summary["valid"]["loss"], rel=1e-5
    )


def test_where_the_hosts_of_training_met_is_nothing_to_scoring(run_summary, scoring, monkeypatch):
    """A laptop that scores a cluster's checkpoint waits for nobody."""
    read = checkpoint.read_metadata

    def read_metadata(path):
        run = read(path)
        run["config"]["distributed"] |= {"coordinator": "node0:1234", "num_processes": 16}
        return run

    monkeypatch.setattr(checkpoint, "read_metadata", read_metadata)
    found = scoring()[0].distributed
    assert (found.coordinator, found.num_processes) == ("", None)
    given = scoring(**{"distributed.coordinator": "auto"})[0].distributed
    assert given.coordinator == "auto"


def test_how_blocks_were_trained_is_nothing_to_scoring(run_summary, scoring, monkeypatch):
    """A checkpoint of a TPU, whose batch is one of whole kernels."""
    read, forms = checkpoint.read_metadata, {"mbconv": "pallas", "remat": "block"}

    def read_metadata(path):
        run = read(path)
        run["config"]["model"] |= forms
        run["config"]["batch_size"] = 128
        return run

    monkeypatch.setattr(checkpoint, "read_metadata", read_metadata)
    for changes in ({}, {f"model.{name}": value for name, value in forms.items()}):
        summary = evaluate.evaluate_checkpoint(*scoring(**changes), "valid")
        assert summary["loss"] == pytest.approx(run_summary["valid"]["loss"], rel=1e-5)


def test_a_field_that_is_gone_is_told_with_its_checkpoint(run_summary, workdir, monkeypatch):
    read = checkpoint.read_metadata

    def read_metadata(path):
        run = read(path)
        run["config"]["model"]["gone"] = 1
        return run

    monkeypatch.setattr(checkpoint, "read_metadata", read_metadata)
    with pytest.raises(UserError, match=r"^checkpoint \S*/3: config\.model\.gone"):
        trained.scoring_config(workdir / "checkpoints" / "3")


def test_what_valid_chose_travels_with_the_checkpoint(run_summary, workdir):
    point = checkpoint.read_metadata(checkpoint.best(workdir))["operating_point"]
    valid = run_summary["valid"]
    assert point["chosen_on"] == "valid"
    # Of four steps: its log-odds may say nothing, and then there is no temperature.
    temperature = valid["calibrated"]["temperature"]
    assert point["temperature"] == (temperature and pytest.approx(temperature, rel=1e-3))
    assert point["threshold"] == pytest.approx(valid["operating_point"]["threshold"], rel=1e-4)


# ---- the command line ---------------------------------------------------------------------------


def run_main(*flags, cwd):
    command = [sys.executable, "-m", "bef_jax.main", *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_eval_needs_a_checkpoint_alone(run_summary, workdir, tmp_path):
    """The run was trained at rcc.eval_size=48; nothing here says so."""
    result = run_main(
        "--mode=eval", f"--checkpoint={workdir}", "--split=valid",
        "--config.eval.threshold=0.4", cwd=tmp_path,
    )  # fmt: skip
    summary = json.loads(result.stdout)
    assert summary["loss"] == pytest.approx(run_summary["valid"]["loss"], rel=1e-5)
    assert summary["threshold"] == 0.4
    assert "config.eval.threshold=0.4; the checkpoint has 0.5" in result.stderr
    assert json.loads((workdir / "eval_summary.json").read_text()) == summary
    assert not list(tmp_path.iterdir())


def test_without_a_run_or_a_checkpoint_one_line_asks_for_it(tmp_path):
    result = run_main("--mode=predict", "--input=x.png", cwd=tmp_path)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2
    assert "--workdir" in line
    assert "--checkpoint" in line
