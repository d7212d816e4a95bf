"""Checkpoints that were damaged on disk; training and resuming are in test_train.py."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bef_jax import checkpoint, sharding
from bef_jax.checkpoint import Checkpoints
from bef_jax.errors import UserError
from bef_jax.state import TrainState

STATE = TrainState(jnp.asarray(3, jnp.int32), {"kernel": jnp.arange(6.0)}, {}, None, ())


@pytest.fixture
def saved(tmp_path):
    """The folder of a checkpoint that was saved after an evaluation."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, STATE, {"config": {"name": "tiny"}}, auc=0.5)
    checkpoints.close()
    return tmp_path / "checkpoints" / "3"


def read(path):
    """Restores the state, and reads the configuration."""
    everywhere = sharding.replicated(sharding.make_mesh())
    abstract = jax.eval_shape(lambda: STATE)
    return checkpoint.restore(path, abstract, everywhere), checkpoint.read_run(path)


def files(path):
    expected = json.loads((path / checkpoint.CHECKSUMS).read_text())
    return [name for name in sorted(expected) if not name.startswith("metrics/")]


def test_what_was_saved_is_read(saved):
    state, run = read(saved)
    np.testing.assert_array_equal(state.params["kernel"], STATE.params["kernel"])
    assert run == {"config": {"name": "tiny"}}


def test_checksums_cover_every_file_of_every_item(saved):
    there = {p.relative_to(saved).as_posix() for p in saved.glob("*/**/*") if p.is_file()}
    assert set(json.loads((saved / checkpoint.CHECKSUMS).read_text())) == there
    assert {Path(name).parts[0] for name in there} == {"state", "run", "metrics"}


def test_a_flipped_bit_in_any_file_is_found_and_named(saved):
    for name in files(saved):
        whole = (saved / name).read_bytes()
        if not whole:
            continue
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        (saved / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"3 is damaged: \S*{name} is not what was saved"):
            read(saved)
        (saved / name).write_bytes(whole)
    read(saved)


def test_a_missing_file_is_named(saved):
    for name in files(saved):
        (saved / name).rename(saved / "away")
        with pytest.raises(UserError, match=f"{name} is not what was saved"):
            read(saved)
        (saved / "away").rename(saved / name)


def test_checkpoints_of_versions_without_checksums_are_read(saved):
    (saved / checkpoint.CHECKSUMS).unlink()
    read(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state/x": 3}'])
def test_damaged_checksums_are_named(saved, text):
    (saved / checkpoint.CHECKSUMS).write_text(text)
    with pytest.raises(UserError, match="3 is damaged"):
        read(saved)


def test_a_damaged_score_is_named_and_not_passed_over(saved):
    (saved / "metrics" / "metrics").write_text('{"valid_auc": 0.')
    with pytest.raises(UserError, match=r"3/metrics/metrics is damaged: .*--checkpoint"):
        checkpoint.best(saved.parents[1])


def test_a_score_that_is_a_folder_is_named(saved):
    (saved / "metrics" / "metrics").unlink()
    (saved / "metrics" / "metrics").mkdir()
    with pytest.raises(UserError, match=r"3/metrics/metrics is damaged: .*--checkpoint"):
        checkpoint.best(saved.parents[1])
