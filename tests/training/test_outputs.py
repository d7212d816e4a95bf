"""Something in the way of a run's files is refused at its start; a damaged summary is named."""

import json
import os
from pathlib import Path

import pytest

from bef_jax import train
from bef_jax.errors import UserError
from bef_jax.training import outputs
from bef_jax.training.outputs import read_train_summary, write_summary
from tests.special_files import BRACKETS, make_special


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
@pytest.mark.parametrize("name", [*outputs.FILES, "report/index.html", "report/loss.png"])
def test_something_in_the_way_of_a_file_is_refused_before_data_are_read(
    kind, name, small_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "open_splits", lambda _: pytest.fail("data were read"))
    (tmp_path / "report").mkdir()
    make_special(kind, tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is in the way of an output file; move it away"):
        train.train_and_evaluate(small_config(), tmp_path)


@pytest.mark.parametrize("name", outputs.FOLDERS)
def test_something_in_the_way_of_a_folder_is_refused_before_data_are_read(
    name, small_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "open_splits", lambda _: pytest.fail("data were read"))
    for make in (os.mkfifo, Path.touch, lambda x: x.symlink_to("nowhere")):
        make(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is in the way of an output folder; move it"):
            train.train_and_evaluate(small_config(), tmp_path)
        (tmp_path / name).unlink()


# ---- the summary of a training run --------------------------------------------------------------

BLOCK = {"split": "valid", "n": 3, "auc": None, "accuracy": 1, "loss": 0.5, "brier": 0.1, "ece": 0}
GOOD = {
    "mode": "train", "step": 6, "params": 9, "images_per_second": 1.5, "wall_seconds": 3,
    "best_step": 6, "valid": BLOCK, "test": None,
}  # fmt: skip


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize("summary", [GOOD, GOOD | {"valid": None, "best_step": None}])
def test_a_summary_is_read_as_it_was_written(summary, tmp_path):
    assert read_train_summary(tmp_path) is None
    write_summary(tmp_path, summary)
    assert read_train_summary(tmp_path) == summary


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "{}", "[]", "3", "null", "\0", BRACKETS,
        *(json.dumps(without(name)) for name in GOOD if name != "mode"),
        *(
            json.dumps(GOOD | change)
            for change in (
                {"step": "6"}, {"step": 6.5}, {"step": -1}, {"step": 2**31}, {"valid": 3},
                {"valid": {}}, {"valid": BLOCK | {"auc": "high"}}, {"test": BLOCK},
                {"valid": BLOCK | {"loss": float("nan")}}, {"wall_seconds": 0},
                {"wall_seconds": 10**400}, {"images_per_second": float("inf")},
            )
        ),
    ],
)  # fmt: skip
def test_a_damaged_summary_is_named_with_what_to_do(text, tmp_path):
    (tmp_path / "train_summary.json").write_text(text)
    expected = r"train_summary\.json: damaged \(.*\); delete it and run again$"
    with pytest.raises(UserError, match=expected):
        read_train_summary(tmp_path)


@pytest.mark.parametrize("step", [-1, 2**31])
def test_an_impossible_step_is_told_with_what_is_possible(step, tmp_path):
    write_summary(tmp_path, GOOD | {"step": step})
    with pytest.raises(UserError, match=rf"\(step is {step}, not in 0 \.\. 2\^31 - 1\)"):
        read_train_summary(tmp_path)


def test_a_fifo_in_place_of_a_summary_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "train_summary.json")
    with pytest.raises(UserError, match=r"train_summary\.json: is a FIFO"):
        read_train_summary(tmp_path)
