"""A CSV with the probability of every patch of a split, so that other figures can be computed."""

import csv
import io
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np

from bef_jax.configs.fields import MOST_CLASSES
from bef_jax.data.patch import label_dtype
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file, write_text
from bef_jax.scoring.metrics import Evaluation

_HEAD = ["id", "label", "probability"]
_OF_CLASS = "probability_"  # the beginning of a column's name, if there are more than two classes
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
# Bytes: some 1.5 million patches of two classes, and ten times as much memory to read. Each further
# class may have 1 MB, 50,000 patches.
_LONGEST = 1 << 26
_FURTHER = 1 << 20
_MOST_LETTERS = 1 << 26  # NumPy gives each id the length of the longest, and each letter 4 bytes


def write_probabilities(file: Path, evaluation: Evaluation) -> None:
    """Writes a CSV with id, label and probability of class 1, in the split's order.

    For more than two classes, the label is the class's name, and each class has a column
    `probability_<name>`. Probabilities have all digits of their float64, so that other programs get
    the same figures.
    """
    # Write to memory first, so that the file appears whole.
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    head, labels = _HEAD, evaluation.labels
    if evaluation.probabilities.ndim == 2:
        head = [*_HEAD[:2], *(f"{_OF_CLASS}{name}" for name in evaluation.classes)]
        labels = np.array([csv_cell(name) for name in evaluation.classes], object)[labels]
    writer.writerow(head)
    rows = zip(map(csv_cell, evaluation.ids), labels, evaluation.probabilities, strict=True)
    # csv writes the repr of Python's floats: the shortest text that reads back as the same float.
    writer.writerows([name, label, *np.atleast_1d(row).tolist()] for name, label, row in rows)
    write_text(file, text.getvalue())


def csv_cell(text: str) -> str:
    """Returns a text as a CSV cell, after an apostrophe where a spreadsheet would run the text.

    Ids come from strangers, and a spreadsheet reads a text that begins with = + - @, a tab or a
    carriage return as a formula. A text with apostrophes before such a character gets one more, so
    that `read_probabilities` can remove it.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def read_probabilities(file: Path, fix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads what `write_probabilities` wrote.

    Args:
        fix: what a user can do about a missing or damaged file; it becomes the end of the error.

    Returns:
        ids, str [N]; labels, [N], uint8 up to 256 classes; and probabilities, float64 [N], or
        [N, K] for K > 2 classes.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with open_user_file(file) as stream:
            head = stream.readline(_LONGEST)
            longest = _LONGEST + _FURTHER * min(head.count(b","), MOST_CLASSES)
            content = head + stream.read(longest + 1)
        if len(content) > longest:
            raise ValueError("it is longer than any file that this program reads")
        return _parse(io.TextIOWrapper(io.BytesIO(content), "utf-8", newline=""))
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{file}: no such file; {fix}") from error
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{file}: damaged ({reason_of(error)}); {fix}") from error


def _parse(text: TextIO) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = csv.reader(text)
    label_of, width = _columns(next(rows, []))
    # Arrays take a tenth of the memory of lists of numbers.
    ids, labels, cells = [], array("H"), array("d")
    for name, label, *probabilities in rows:
        if len(probabilities) != width:
            raise ValueError(f"a line has {len(probabilities)} probabilities, not {width}")
        ids.append(_text_of(name))
        labels.append(label_of(label))
        cells.extend(map(float, probabilities))
    labels, cells = np.array(labels), np.array(cells)
    if (labels >= max(width, 2)).any() or not ((cells >= 0) & (cells <= 1)).all():  # NaN too
        raise ValueError("a label is not 0 or 1, or a probability is not in [0, 1]")
    if len(ids) * max(map(len, ids), default=0) > _MOST_LETTERS:
        raise ValueError("its ids are longer than this program reads")
    labels = labels.astype(label_dtype(max(width, 2)))
    return np.array(ids, str), labels, cells if width == 1 else cells.reshape(-1, width)


def _columns(head: list[str]) -> tuple[Callable[[str], int], int]:
    """Returns the function that reads a label's cell, and how many columns of probabilities follow.

    Raises:
        ValueError: it is not a first line of `write_probabilities`.
    """
    if head == _HEAD:
        return int, 1
    if len(head) > MOST_CLASSES + 2:
        raise ValueError(f"it has more than {MOST_CLASSES:,} classes")
    names = [name.removeprefix(_OF_CLASS) for name in head[2:] if name.startswith(_OF_CLASS)]
    is_ours = head[:2] == _HEAD[:2] and len(names) == len(head) - 2 > 2
    if not is_ours or len(set(names)) < len(names):
        raise ValueError("its first line is not id,label,probability")
    numbers = {csv_cell(name): number for number, name in enumerate(names)}

    def number_of(cell: str) -> int:
        if cell not in numbers:
            raise ValueError(f"{cell[:100]} is not one of its classes")
        return numbers[cell]

    return number_of, len(names)


def _text_of(cell: str) -> str:
    """Returns the text from which `csv_cell` made the cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
