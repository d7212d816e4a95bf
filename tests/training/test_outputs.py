"""What is in the way of a run's files is told at its start."""

import os
from pathlib import Path

import pytest

from bef_jax import train
from bef_jax.errors import UserError
from bef_jax.training import outputs


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
@pytest.mark.parametrize("name", [*outputs.FILES, "report/index.html", "report/loss.png"])
def test_what_is_in_the_way_of_a_file_is_told_before_data_are_read(
    kind, name, small_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "open_splits", lambda _: pytest.fail("too late"))
    (tmp_path / "report").mkdir()
    make = {"FIFO": os.mkfifo, "folder": os.mkdir, "device": lambda x: x.symlink_to("/dev/zero")}
    make[kind](tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is in the way of an output file; move it away"):
        train.train_and_evaluate(small_config(), tmp_path)


@pytest.mark.parametrize("name", outputs.FOLDERS)
def test_what_is_in_the_way_of_a_folder_is_told_before_data_are_read(
    name, small_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "open_splits", lambda _: pytest.fail("too late"))
    for make in (os.mkfifo, Path.touch, lambda x: x.symlink_to("nowhere")):
        make(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is in the way of an output folder; move it"):
            train.train_and_evaluate(small_config(), tmp_path)
        (tmp_path / name).unlink()
