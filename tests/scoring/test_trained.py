"""Fields that a checkpoint decides, and fields that users may change to score with it.

Scores are compared with those of the training run.
"""

import json
import logging
import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from bef_jax import evaluate
from bef_jax.errors import UserError
from bef_jax.scoring import trained
from bef_jax.training import checkpoint
from tests.conftest import ROOT


@pytest.fixture
def change_saved(monkeypatch):
    """Returns change_saved({"a.b": value}), which changes the config that checkpoints have."""
    read = checkpoint.read_metadata

    def change(fields):
        def read_changed(path):
            run = read(path)
            config = ConfigDict(run["config"])
            config.update_from_flattened_dict(fields)
            return run | {"config": config.to_dict()}

        monkeypatch.setattr(checkpoint, "read_metadata", read_changed)

    return change


def test_a_workdir_stands_for_its_best_checkpoint(run_summary, workdir):
    best = checkpoint.best(workdir)
    assert trained.find(workdir) == trained.find(best) == best.resolve()
    older = workdir / "checkpoints" / "3"
    assert trained.find(str(older)) == older.resolve()
    assert trained.workdir_of(older) == workdir


def test_without_a_checkpoint_an_error_says_to_train_first(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there; train first"):
        trained.find(tmp_path)


def test_fields_that_decide_a_score_come_from_the_checkpoint(
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
    logged = {line.split("=")[0] for line in caplog.messages if "the checkpoint decides" in line}
    assert logged == {f"config.{name}" for name in other} - {"config.eval.batch_size",
                                                           "config.data.dir"}  # fmt: skip


def test_a_change_of_a_single_field_is_used_and_logged(run_summary, scoring, caplog):
    changes = {"rcc.eval_size": 64, "eval.threshold": 0.25, "augment.mean": (0.5, 0.5, 0.5)}
    with caplog.at_level(logging.INFO, logger="bef_jax"):
        config, _ = scoring(**changes, **{"eval.batch_size": 3})
    assert (config.rcc.eval_size, config.eval.threshold, config.eval.batch_size) == (64, 0.25, 3)
    assert [line for line in caplog.messages if "the checkpoint has" in line] == [
        "config.augment.mean=[0.5, 0.5, 0.5]; the checkpoint has [0.7, 0.54, 0.69]",
        "config.eval.threshold=0.25; the checkpoint has 0.5",
        "config.rcc.eval_size=64; the checkpoint has 48",
    ]


def test_the_scale_is_that_of_training_whatever_is_scored(
    run_summary, scoring, small_config, change_saved
):
    _, path = scoring()
    change_saved({"data.source": "pcam_hdf5"})
    elsewhere = small_config(**{"data.source": "npz", "data.dir": "elsewhere"})
    assert trained.scoring_config(path, elsewhere).data.mpp == 0.972
    change_saved({"data.source": "npz"})
    pcam = small_config(**{"data.source": "pcam_hdf5"})
    assert trained.scoring_config(path, pcam).data.mpp == 0
    change_saved({"data.mpp": 0.5})
    assert trained.scoring_config(path, pcam).data.mpp == 0.5


def test_smaller_patches_can_be_scored_than_the_run_was_trained_on(run_summary, scoring):
    """The windows of training had 40 .. 48 px, and need not fit, because scoring draws none."""
    changes = {"data.patch_size": 32, "rcc.eval_size": 32}
    config, _ = scoring(**changes)
    assert (config.data.patch_size, config.rcc.eval_size) == (32, 32)
    with pytest.raises(UserError, match=r"rcc\.eval_size=48 is above data\.patch_size=32"):
        scoring(**{"data.patch_size": 32})
    config, _ = scoring(**{"data.patch_size": 224})
    assert (config.data.patch_size, config.rcc.eval_size) == (224, 48)


def test_flags_of_another_network_are_refused_and_of_the_same_one_are_not(run_summary, scoring):
    scoring(**{"model.fusion": True, "model.depthwise": "native", "model.remat": "block"})
    with pytest.raises(UserError, match=r"model\.fusion=True: leave out --config\.model\.fusion"):
        scoring(**{"model.fusion": False})


def test_scoring_ignores_flags_of_training(run_summary, scoring):
    """A user may repeat the flags of the run, or give those of the next run."""
    config, path = scoring(**{"ema_decay": 0.0, "optim.name": "sgd", "steps": 7})
    assert config.ema_decay == checkpoint.read_metadata(path)["config"]["ema_decay"] > 0
    assert evaluate.evaluate_checkpoint(config, path, "valid")["loss"] == pytest.approx(
        run_summary["valid"]["loss"], rel=1e-5
    )


def test_scoring_ignores_the_coordinator_of_training(run_summary, scoring, change_saved):
    """A laptop that scores a cluster's checkpoint does not wait for other hosts."""
    change_saved({"distributed.coordinator": "node0:1234", "distributed.num_processes": 16})
    found = scoring()[0].distributed
    assert (found.coordinator, found.num_processes) == ("", None)
    given = scoring(**{"distributed.coordinator": "auto"})[0].distributed
    assert given.coordinator == "auto"


def test_scoring_ignores_how_training_computed_blocks(run_summary, scoring, change_saved):
    """The checkpoint is as from a TPU: Pallas kernels, and a batch size that they take."""
    forms = {"model.mbconv": "pallas", "model.remat": "block"}
    change_saved(forms | {"batch_size": 128})
    for changes in ({}, forms):
        config, path = scoring(**changes)
        assert (config.model.mbconv, config.model.remat) == ("layers", "none")
        summary = evaluate.evaluate_checkpoint(config, path, "valid")
        assert summary["loss"] == pytest.approx(run_summary["valid"]["loss"], rel=1e-5)


def test_the_error_about_an_unknown_field_names_the_checkpoint(run_summary, workdir, change_saved):
    change_saved({"model.gone": 1})
    with pytest.raises(UserError, match=r"^checkpoint \S*/3: config\.model\.gone"):
        trained.scoring_config(workdir / "checkpoints" / "3")


@pytest.mark.parametrize("classes", [("a", "b", "c"), ("a",), (1, 2)])
def test_the_error_about_wrong_names_of_classes_is_one_line(
    classes, run_summary, workdir, change_saved
):
    change_saved({"data.classes": classes})
    path = checkpoint.best(workdir)
    with pytest.raises(
        UserError, match=r"data\.classes(=\(1, 2\): give texts| does not name 2 classes)"
    ) as error:
        trained.scoring_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_checkpoint_has_the_operating_point_that_valid_chose(run_summary, workdir):
    point = checkpoint.read_metadata(checkpoint.best(workdir))["operating_point"]
    valid = run_summary["valid"]
    assert point["chosen_on"] == "valid"
    # After four steps the log-odds may be wrong on the whole, and then there is no temperature.
    temperature = valid["calibrated"]["temperature"]
    assert point["temperature"] == (temperature and pytest.approx(temperature, rel=1e-3))
    assert point["threshold"] == pytest.approx(valid["operating_point"]["threshold"], rel=1e-4)


# ---- the command line ---------------------------------------------------------------------------


def run_main(*flags, cwd):
    command = [sys.executable, "-m", "bef_jax.main", *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_eval_needs_only_a_checkpoint(run_summary, workdir, tmp_path):
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


def test_without_a_run_or_a_checkpoint_the_error_asks_for_one(tmp_path):
    result = run_main("--mode=predict", "--input=x.png", cwd=tmp_path)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2
    assert "--workdir" in line
    assert "--checkpoint" in line
