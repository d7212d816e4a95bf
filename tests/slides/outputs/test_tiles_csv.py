"""tiles.csv.gz, read by the csv module."""

import csv
import gzip
import time

import numpy as np
import pytest

from bef_jax.slides.outputs.tiles_csv import write_tiles
from tests.slides.outputs.fake_slide import grid_of, windows_of


def rows_of(file):
    with gzip.open(file, "rt", newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_each_window_has_a_line(tmp_path):
    rng = np.random.default_rng(0)
    probability = rng.random((70, 50))
    probability[rng.random((70, 50)) < 0.3] = np.nan
    probability[40, 20:30] = -1
    grid, _ = grid_of(70, 50, stride=16, scale=(4.016, 4.03))
    write_tiles(tmp_path / "a.gz", grid, windows_of(probability)(), ("a", "b"))
    head, *rows = rows_of(tmp_path / "a.gz")
    assert head == ["x", "y", "side", "probability"]
    expected = [
        [str(round(c * 16 * 4.016)), str(round(r * 16 * 4.03)), "128.74",
         repr(float(value)) if value >= 0 else ""]
        for (r, c), value in np.ndenumerate(probability) if not np.isnan(value)
    ]  # fmt: skip
    assert rows == expected


def test_of_many_classes_a_line_has_the_class_and_all_probabilities(tmp_path):
    names = ("a,b", 'quote"', "=cmd", "line\nbreak")
    probability = np.random.default_rng(0).dirichlet(np.ones(4), (3, 5))
    probability[1, 2], probability[2, 2] = np.nan, -1
    grid, _ = grid_of(3, 5)
    write_tiles(tmp_path / "a.gz", grid, windows_of(probability)(), names)
    head, *rows = rows_of(tmp_path / "a.gz")
    shown = ["a,b", 'quote"', "=cmd", "line\\nbreak"]
    assert head == ["x", "y", "side", "class", *(f"probability_{name}" for name in shown)]
    assert len(rows) == 14
    assert rows[0][3] == ["a,b", 'quote"', "'=cmd", "line\\nbreak"][probability[0, 0].argmax()]
    assert list(map(float, rows[0][4:])) == probability[0, 0].tolist()
    failed = [row for row in rows if row[:2] == [str(2 * 128), str(2 * 128)]]
    assert failed == [[str(2 * 128), str(2 * 128), "128", *[""] * 5]]


def test_the_same_windows_give_the_same_bytes_without_a_time_or_a_name(tmp_path):
    grid, _ = grid_of(40, 40)
    probability = np.random.default_rng(0).random((40, 40))
    for name in ("a.gz", "b.gz"):
        write_tiles(tmp_path / name, grid, windows_of(probability)(), ("a", "b"))
    content = (tmp_path / "a.gz").read_bytes()
    assert content == (tmp_path / "b.gz").read_bytes()
    assert content[3:8] == bytes(5)  # no flags, so no name, and the time 0


@pytest.mark.parametrize("failed", [0.0, 0.5])
def test_writing_takes_little_more_time_than_formatting_numbers(failed, tmp_path):
    probability = np.random.default_rng(0).random((400, 500))
    probability[np.random.default_rng(1).random((400, 500)) < failed] = -1
    grid, windows = grid_of(400, 500)[0], list(windows_of(probability)())
    start = time.process_time()
    write_tiles(tmp_path / "a.gz", grid, windows, ("a", "b"))
    writing = time.process_time() - start
    start = time.process_time()
    "".join(map(repr, np.random.default_rng(0).random(200_000).tolist()))
    assert writing < 12 * (time.process_time() - start)
