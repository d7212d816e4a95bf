"""Files of probabilities, compared with what was written, and with the csv module of Python."""

import csv
import os

import numpy as np
import pytest

from bef_jax.errors import UserError
from bef_jax.scoring.metrics import Evaluation
from bef_jax.scoring.probabilities_csv import csv_cell, read_probabilities, write_probabilities


def test_every_digit_and_every_id_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    probabilities = np.append(rng.random(5), [0.0, 1e-300, 1 - 2**-53])
    ids = np.array(["plain", "a,b", 'say "x"', "Größe", "two\nlines", "f", "g", "h"])
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.uint8)
    file = tmp_path / "scores_valid.csv"
    write_probabilities(file, Evaluation("valid", ids, labels, probabilities, {}))
    wrote = (ids, labels, probabilities)
    for written, found in zip(wrote, read_probabilities(file, ""), strict=True):
        np.testing.assert_array_equal(written, found)
    assert next(csv.reader(file.open(newline=""))) == ["id", "label", "probability"]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=cmd|' /C calc'!A0.png", "'=cmd|' /C calc'!A0.png"),
        ("+1.png", "'+1.png"),
        ("-2+3.png", "'-2+3.png"),
        ("@sum.png", "'@sum.png"),
        ("\tx", "'\tx"),
        ("\rx", "'\rx"),
        ("a=1.png", "a=1.png"),
        ("'quoted'.png", "'quoted'.png"),
        ("'=1.png", "''=1.png"),
        ("''-", "'''-"),
        ("''", "''"),
        ("", ""),
    ],
)
def test_a_cell_that_a_spreadsheet_would_run_is_text_and_comes_back(text, cell, tmp_path):
    assert csv_cell(text) == cell
    file = tmp_path / "scores_valid.csv"
    ids, labels = np.array([text, "other"]), np.array([0, 1], np.uint8)
    write_probabilities(file, Evaluation("valid", ids, labels, np.array([0.25, 0.5]), {}))
    assert list(csv.reader(file.open(newline="")))[1][0] == cell
    np.testing.assert_array_equal(read_probabilities(file, "")[0], ids)


CLASSES = ("fat", "=1+1", 'a "b", c', "two\nlines", "-", "Größe", "label")


def test_more_than_two_classes_have_a_column_each_and_come_back(tmp_path):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(7), 20)
    ids, labels = np.array([f"p{row}" for row in range(20)]), rng.integers(0, 7, 20, np.uint8)
    file = tmp_path / "scores_valid.csv"
    evaluation = Evaluation("valid", ids, labels, probabilities, {}, classes=CLASSES)
    write_probabilities(file, evaluation)
    wrote = (ids, labels, probabilities)
    for written, found in zip(wrote, read_probabilities(file, ""), strict=True):
        assert written.dtype == found.dtype
        np.testing.assert_array_equal(written, found)
    with file.open(newline="", encoding="utf-8") as stream:
        first, *rows = csv.DictReader(stream)
    assert list(first) == ["id", "label", *(f"probability_{name}" for name in CLASSES)]
    for number, row in enumerate([first, *rows]):
        name = CLASSES[labels[number]]
        assert row["label"] == {"=1+1": "'=1+1", "-": "'-"}.get(name, name)
        assert float(row[f"probability_{name}"]) == probabilities[number, labels[number]]


def test_labels_of_more_than_256_classes_come_back(tmp_path):
    file, names = tmp_path / "scores_valid.csv", tuple(map(str, range(300)))
    ids, labels = np.array(["a", "b"]), np.array([1, 299], np.uint16)
    probabilities = np.full((2, 300), 1 / 300)
    write_probabilities(file, Evaluation("valid", ids, labels, probabilities, {}, classes=names))
    _, found, _ = read_probabilities(file, "")
    np.testing.assert_array_equal(found, labels)


HEAD = "id,label,probability\n"
OF_CLASSES = "id,label,probability_a,probability_b,probability_c\n"
DAMAGED = {
    "empty": "",
    "zeros": "\0\0",
    "one letter": "x",
    "no probabilities": "id,label\na,0\n",
    "cut row": HEAD + "a,0",
    "four cells": HEAD + "a,0,0.5,1\n",
    "label 2": HEAD + "a,2,0.5\n",
    "label -1": HEAD + "a,-1,0\n",
    "label 999": HEAD + "a,999,0\n",
    "probability NaN": HEAD + "a,0,nan\n",
    "probability 2": HEAD + "a,0,2\n",
    "empty row": HEAD + "\n",
    "two columns of classes": "id,label,probability_a,probability_b\nx,a,0,1\n",
    "a class twice": "id,label,probability_a,probability_b,probability_a\nx,a,0,1,0\n",
    "another column": OF_CLASSES.replace("probability_c", "c") + "x,a,0,1,0\n",
    "10,001 classes": "id,label," + ",".join(f"probability_{i}" for i in range(10_001)) + "\n",
    "a class too few": OF_CLASSES + "x,a,0,1\n",
    "a class too many": OF_CLASSES + "x,a,0,1,0,0\n",
    "an unknown class": OF_CLASSES + "x,d,0,1,0\n",
    "a class's probability 2": OF_CLASSES + "x,a,0,2,0\n",
    "a class's probability NaN": OF_CLASSES + "x,a,0,nan,0\n",
    "long id": HEAD + "x" * 200_000 + ",0,0\n",
    "long id in many rows": HEAD + "x" * 9000 + ",0,0\n" + "a,0,0\n" * 9000,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_error_about_a_damaged_file_says_what_to_do(damage, tmp_path):
    file = tmp_path / "scores_valid.csv"
    file.write_text(DAMAGED[damage])
    with pytest.raises(UserError, match=r"scores_valid\.csv: damaged \(.*\); train again$"):
        read_probabilities(file, "train again")


def test_a_missing_special_or_endless_file_is_named(tmp_path):
    file = tmp_path / "scores_valid.csv"
    with pytest.raises(UserError, match=r"scores_valid\.csv: no such file; train again$"):
        read_probabilities(file, "train again")
    file.write_bytes(HEAD.encode() + b"\xff,0,0\n")
    with pytest.raises(UserError, match=r"scores_valid\.csv: damaged"):
        read_probabilities(file, "train again")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"scores_valid\.csv: is a FIFO"):
        read_probabilities(file, "train again")
    file.unlink()
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(UserError, match="longer than any"):
        read_probabilities(file, "train again")
