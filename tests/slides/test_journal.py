"""Saves rows of blocks, damages them, and looks which are read again."""

import dataclasses
import os

import numpy as np
import pytest

from bef_jax.data.patch import Tiling
from bef_jax.errors import RunError
from bef_jax.scoring.slide_scorer import Windows
from bef_jax.slides.journal import fingerprint, open_journal
from bef_jax.slides.tiles import Grid

GRID = Grid(
    Tiling(96, 32, 32), 0, (1.0, 1.0), (1.0, 1.0), 50 * 32, 70 * 32, rows=70, columns=50, mpp=0.97
)  # fmt: skip
PLAN = {"format": 1, "name": "\udcff", "scale": (1.0, 2.0)}


def windows_of(number, classes=2):
    """Returns some windows of a row of blocks: a third of them, the first with NaN."""
    rng = np.random.default_rng(number)
    rows, columns = np.divmod(np.arange(0, 10 * 50, 3, dtype=np.int32), 50)
    shape = (len(rows),) if classes == 2 else (len(rows), classes)
    probabilities = rng.random(shape)
    probabilities[0] = np.nan
    return Windows(rows + number * 30, columns, probabilities)


def assert_same(found, expected):
    for name, values in vars(expected).items():
        assert getattr(found, name).dtype == values.dtype
        np.testing.assert_array_equal(getattr(found, name), values)


@pytest.mark.parametrize("classes", [2, 3])
def test_rows_come_back_as_they_were_saved(classes, tmp_path):
    folder = tmp_path / "a" / ".partial"
    journal = open_journal(folder, PLAN, GRID, classes)
    assert journal.missing() == [0, 1, 2]
    journal.save(1, windows_of(1, classes))
    again = open_journal(folder, PLAN, GRID, classes)
    assert again.missing() == [0, 2]
    for number in (0, 2):
        again.save(number, windows_of(number, classes))
    for _ in range(2):  # as often as asked
        for number, found in enumerate(again.windows()):
            assert_same(found, windows_of(number, classes))
    again.remove()
    assert not folder.exists()


def test_a_row_without_tissue_is_saved_too(tmp_path):
    journal = open_journal(tmp_path / "a", PLAN, GRID, 2)
    nothing = Windows(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0))
    journal.save(0, nothing)
    assert journal.missing() == [1, 2]
    assert_same(journal.load(0), nothing)


def test_another_plan_starts_again_with_a_line(tmp_path, caplog):
    caplog.set_level("INFO", logger="bef_jax")
    open_journal(tmp_path / "a", PLAN, GRID, 2).save(0, windows_of(0))
    assert open_journal(tmp_path / "a", PLAN, GRID, 2).missing() == [1, 2]
    assert not caplog.text
    assert open_journal(tmp_path / "a", PLAN | {"format": 2}, GRID, 2).missing() == [0, 1, 2]
    assert caplog.text.count("starts again") == 1
    # A plan that was cut is no plan.
    open_journal(tmp_path / "a", PLAN, GRID, 2).save(0, windows_of(0))
    (tmp_path / "a" / "plan.json").write_text('{"format": ')
    assert open_journal(tmp_path / "a", PLAN, GRID, 2).missing() == [0, 1, 2]


def test_fingerprints_differ_as_plans_do():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def changed(**arrays):
    return lambda journal: journal.save(1, dataclasses.replace(windows_of(1), **arrays))


def cut(journal):
    content = journal.file(1).read_bytes()
    journal.file(1).write_bytes(content[: len(content) // 2])


def pickle(journal):
    np.savez(journal.file(1), rows=np.array([{}], object), columns=[], probabilities=[])


def fifo(journal):
    journal.file(1).unlink()
    os.mkfifo(journal.file(1))


GOOD = windows_of(1)
DAMAGE = {
    "cut": cut,
    "pickle": pickle,
    "fifo": fifo,
    "empty": lambda journal: journal.file(1).write_bytes(b""),
    "text": lambda journal: journal.file(1).write_text("rows"),
    "long": lambda journal: journal.file(1).write_bytes(bytes(1 << 20)),
    "other arrays": lambda journal: np.savez(journal.file(1), rows=[1]),
    "other type": changed(rows=GOOD.rows.astype(np.int64)),
    "float32": changed(probabilities=GOOD.probabilities.astype(np.float32)),
    "shape": changed(columns=GOOD.columns[1:]),
    "two dimensions": changed(probabilities=GOOD.probabilities[:, None]),
    "order": changed(columns=GOOD.columns[::-1].copy()),
    "twice": changed(rows=np.full_like(GOOD.rows, 30), columns=np.zeros_like(GOOD.columns)),
    "another row": changed(rows=GOOD.rows - 30),
    "outside": changed(columns=GOOD.columns + 50),
    "above 1": changed(probabilities=GOOD.probabilities + 1),
    "below 0": changed(probabilities=GOOD.probabilities - 1),
    "infinite": changed(probabilities=np.full_like(GOOD.probabilities, np.inf)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_row_is_read_again(name, tmp_path, caplog):
    journal = open_journal(tmp_path, PLAN, GRID, 2)
    for number in range(3):
        journal.save(number, windows_of(number))
    DAMAGE[name](journal)
    assert journal.missing() == [1]
    assert "row_00001.npz" in caplog.text
    with pytest.raises(RunError, match=r"row_00001\.npz: is gone"):
        list(journal.windows())


def test_a_flipped_bit_never_changes_what_is_read(tmp_path):
    journal = open_journal(tmp_path, PLAN, GRID, 2)
    journal.save(0, windows_of(0))
    content = journal.file(0).read_bytes()
    refused = 0
    for place in range(0, len(content), 13):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        journal.file(0).write_bytes(changed)
        if (found := journal.load(0)) is None:
            refused += 1
        else:  # a byte of the archive that nobody reads, such as a date
            assert_same(found, windows_of(0))
    assert refused > 0.8 * len(content) / 13


def test_what_a_kill_left_half_written_is_no_row(tmp_path):
    journal = open_journal(tmp_path, PLAN, GRID, 2)
    journal.save(0, windows_of(0))
    journal.file(0).rename(tmp_path / ".tmp-1-abcd")
    assert journal.missing() == [0, 1, 2]
