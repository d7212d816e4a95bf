"""Small checkpoints: what is read is what was saved, and the right ones are kept.

Training and resuming are in test_train.py.
"""

import json
import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from bef_jax.configs.default import get_config
from bef_jax.errors import UserError
from bef_jax.runtime import sharding
from bef_jax.training import checkpoint
from bef_jax.training.checkpoint import Checkpoints
from tests.checkpoints import STATE, read


@pytest.mark.smoke
def test_what_was_saved_is_read(saved):
    state, run = read(saved)
    np.testing.assert_array_equal(state.params["kernel"], STATE.params["kernel"])
    assert run == {"config": {"name": "tiny"}}


def test_a_state_is_restored_onto_the_devices_of_the_sharding(saved):
    mesh = sharding.make_mesh()
    state, _ = read(saved)
    assert state.params["kernel"].sharding == sharding.replicated(mesh)
    assert state.step == 3


@pytest.mark.parametrize("workdir", ["missing", "empty"])
def test_a_missing_checkpoint_is_an_error_that_asks_for_one(workdir, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoints: no checkpoint there; train first, or give"):
        checkpoint.best(tmp_path / workdir)
    with pytest.raises(UserError, match="7: no checkpoint there"):
        checkpoint.read_metadata(tmp_path / workdir / "checkpoints" / "7")


def test_another_shape_is_refused_in_one_line_that_says_why(saved):
    other = STATE.replace(params={"kernel": np.zeros(7, np.float32)})
    everywhere = sharding.replicated(sharding.make_mesh())
    shapes = r"3 can't be read: .*\([67],\).*\([67],\)"
    with pytest.raises(UserError, match=shapes) as raised:
        checkpoint.restore(saved, jax.eval_shape(lambda: other), everywhere)
    assert "\n" not in str(raised.value)


@pytest.mark.smoke
def test_a_missing_part_is_named_even_without_checksums(saved):
    (saved / checkpoint.CHECKSUMS).unlink()
    (saved / "run" / "metadata").unlink()
    with pytest.raises(UserError, match=r"3 can't be read: .*run/metadata"):
        checkpoint.read_metadata(saved)


# ---- which are kept -----------------------------------------------------------------------------


def save_all(workdir, keep, scores):
    """Saves a checkpoint at steps 1, 2, ... with these AUCs; returns the steps that are on disk."""
    checkpoints = Checkpoints(workdir, keep)
    for step, auc in enumerate(scores, 1):
        checkpoints.save(step, STATE, {}, auc)
        checkpoints.wait()
    checkpoints.close()
    return checkpoint.saved_steps(workdir)


@pytest.mark.parametrize(
    ("keep", "scores", "kept"),
    [
        (1, [0.6, 0.9, 0.7, 0.8], [2, 4]),
        (2, [0.6, 0.9, 0.7, 0.8], [2, 3, 4]),
        (1, [0.6, 0.7, 0.8, 0.9], [4]),
        (1, [0.9, None, None], [1, 3]),  # None: saved between evaluations
        (2, [None, None, None], [2, 3]),
    ],
)
def test_the_newest_checkpoints_and_the_best_are_kept(keep, scores, kept, tmp_path):
    assert save_all(tmp_path, keep, scores) == kept


def test_best_finds_the_checkpoint_with_the_highest_score(tmp_path):
    save_all(tmp_path, 3, [0.2, 0.9, 0.4])
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoints" / "2"


@pytest.mark.parametrize(("scores", "best"), [([0.0, None], 1), ([None, None], 2), ([0.5] * 2, 2)])
def test_any_score_beats_none_and_the_newest_of_equal_scores_is_best(scores, best, tmp_path):
    save_all(tmp_path, 2, scores)
    assert checkpoint.best(tmp_path).name == str(best)


def test_newest_finds_the_last_step_up_to_a_limit(tmp_path):
    save_all(tmp_path, 3, [None] * 3)
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.newest() == tmp_path / "checkpoints" / "3"
    assert checkpoints.newest(at_most=2).name == "2"
    assert checkpoints.newest(at_most=7).name == "3"
    assert checkpoints.newest(at_most=0) is None
    checkpoints.close()


def test_a_workdir_without_checkpoints_has_no_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.newest() is None
    checkpoints.close()


def test_a_second_save_of_a_step_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, STATE, {"config": {"name": "first"}}, None)
    checkpoints.wait()
    checkpoints.save(1, STATE, {"config": {"name": "again"}}, None)
    checkpoints.close()
    run = checkpoint.read_metadata(tmp_path / "checkpoints" / "1")
    assert run == {"config": {"name": "first"}}


def test_what_a_killed_save_left_behind_is_removed(saved):
    left = saved.parent / "4.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    checkpoints = Checkpoints(saved.parents[1], 2)
    # The save waits for the removal, which Orbax does in the background.
    checkpoints.save(5, STATE, {}, None)
    checkpoints.close()
    assert not left.exists()
    read(saved)


# ---- which configurations fit -------------------------------------------------------------------


def check_fit(before, after):
    """Checks whether a checkpoint with the fields `before` fits a run with the fields `after`."""
    saved = json.loads(get_config(before).to_json_best_effort())
    checkpoint.check_fits(saved, get_config(after), Path("runs/b2/checkpoints/5"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.name=efficientnet_b0", "model.name=efficientnet_b1"),
        ("model.num_classes=2", "model.num_classes=3"),
        ("model.fusion=True", "model.fusion=False"),
        ("optim.name=adamw", "optim.name=sgd"),
        ("optim.freeze=", "optim.freeze=stem"),
        ("ema_decay=0.0", "ema_decay=0.5"),
        ("ema_decay=0.5", "ema_decay=0.0"),
        ("optim.name=sgd,optim.momentum=0.0", "optim.name=sgd,optim.momentum=0.5"),
        ("optim.clip_norm=0.0", "optim.clip_norm=2.0"),
        ("optim.head_only_steps=0", "optim.head_only_steps=4"),
        ("optim.layer_decay=1.0", "optim.layer_decay=0.5"),
    ],
)
def test_a_checkpoint_of_another_network_or_optimiser_state_is_refused(before, after):
    # The last field differs. A field before it selects an optimiser that uses it.
    (field, old), (_, new) = (text.split(",")[-1].split("=") for text in (before, after))
    message = (
        rf"^checkpoint runs/b2/checkpoints/5 was trained with another {field} "
        rf"\(saved '?{old}'?, now '?{new}'?\)$"
    )
    with pytest.raises(UserError, match=message):
        check_fit(before, after)


def test_all_fields_that_differ_are_named():
    with pytest.raises(UserError, match=r"model\.\w+ \(.*\), model\.\w+ \("):
        check_fit("model.name=efficientnet_b1,model.fusion=True", "model.fusion=False")


@pytest.mark.parametrize(
    "field",
    [
        "optim.learning_rate=0.5", "seed=3", "batch_size=8", "model.dropout=0.125",
        "model.drop_path=0.125", "model.bn_momentum=0.5", "model.depthwise=native",
        "model.remat=block", "model.mbconv=pallas", "ema_decay=0.75", "optim.clip_norm=7.0",
        "optim.weight_decay=0.5",
    ],
)  # fmt: skip
def test_fields_that_change_no_shape_are_logged_with_both_values(field, caplog):
    name, value = field.split("=")
    with caplog.at_level(logging.WARNING):
        check_fit(None, field)
    (message,) = caplog.messages
    assert message.startswith(f"config.{name} was ")
    assert re.search(rf" in runs/b2/checkpoints/5, is '?{value}'? now$", message)


@pytest.mark.parametrize("field", ["seed=0", "distributed.num_processes=8"])
def test_equal_fields_and_fields_of_the_machine_are_not_logged(field, caplog):
    check_fit(None, field)
    assert not caplog.messages


def test_fields_newer_than_a_checkpoint_get_their_defaults():
    saved = json.loads(get_config("seed=5,model.fusion=False").to_json_best_effort())
    del saved["batch_size"], saved["model"]["attention"]
    config, default = checkpoint.with_defaults(saved), get_config()
    assert (config.seed, config.model.fusion) == (5, False)
    assert config.batch_size == default.batch_size
    assert config.model.attention == default.model.attention
