"""Compares the summary of --mode=prepare with the store that it made."""

import json
import time

import pytest

from bef_jax.configs.default import get_config
from bef_jax.data import prepare, store
from bef_jax.errors import UserError


@pytest.fixture
def config(tmp_path):
    config = get_config()
    config.data.update(
        {"source": "synthetic", "dir": str(tmp_path), "train_size": 40, "valid_size": 20}
    )
    config.data.test_size = 10
    return config


def test_summary_describes_the_store(config):
    summary = prepare.prepare_or_verify(config, verify=True)
    assert summary["mode"] == "prepare"
    assert summary["counts"] == {"train": 40, "valid": 20, "test": 10}
    for name, fraction in summary["positive_fraction"].items():
        split = store.open_split(summary["store"], name)
        assert fraction == pytest.approx(split.labels.mean())
    assert summary["duplicates"]["conflicting_labels"] == 0
    assert set(summary["content"]) == {"train", "valid", "test", "total"}
    assert summary["wall_seconds"] > 0
    assert json.loads(json.dumps(summary)) == summary


def test_second_run_returns_the_same_summary_with_its_own_time(config):
    first = prepare.prepare_or_verify(config, verify=False)
    start = time.perf_counter()
    second = prepare.prepare_or_verify(config, verify=False)
    assert 0 < second["wall_seconds"] <= time.perf_counter() - start
    assert second == first | {"wall_seconds": second["wall_seconds"]}


def test_nothing_goes_to_stdout(config, capsys):
    prepare.prepare_or_verify(config, verify=False)
    assert capsys.readouterr().out == ""


def test_each_piece_of_work_is_a_line_on_stderr(config, capsys):
    prepare.prepare_or_verify(config, verify=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines if "  in 0:00:0" in line] == [
        "reading test",
        "reading valid",
        "reading train",
        "checking files (sha256)",
        "verifying",
    ]
    assert "reading train: 40/40 patches" in lines[2]


def test_second_run_reports_no_work(config, capsys):
    prepare.prepare_or_verify(config, verify=False)
    capsys.readouterr()
    prepare.prepare_or_verify(config, verify=False)
    assert capsys.readouterr().err == ""


def test_missing_files_of_the_source_are_a_user_error(config):
    config.data.source = "npz"
    with pytest.raises(UserError, match=r"train\.npz|valid\.npz"):
        prepare.prepare_or_verify(config, verify=False)


def test_verify_names_the_damaged_file(config):
    folder = store.store_path(config.data)
    prepare.prepare_or_verify(config, verify=False)
    for name in ("train/images.npy", "valid/labels.npy"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        prepare.prepare_or_verify(config, verify=False)  # looks only at sizes
        with pytest.raises(UserError, match=f"{name}: damaged"):
            prepare.prepare_or_verify(config, verify=True)
        (folder / name).write_bytes(whole)
    assert prepare.prepare_or_verify(config, verify=True)["verified"]
