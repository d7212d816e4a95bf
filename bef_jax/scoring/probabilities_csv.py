"""A CSV with the probability of every patch of a split, so that other figures can be computed."""

import csv
import io
import re
from array import array
from pathlib import Path
from typing import TextIO

import numpy as np

from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file, write_text
from bef_jax.scoring.metrics import Evaluation

_HEAD = ["id", "label", "probability"]
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_LONGEST = 1 << 26  # bytes: some 1.5 million patches, and ten times as much memory to read
_MOST_LETTERS = 1 << 26  # NumPy gives each id the length of the longest, and each letter 4 bytes


def write_probabilities(file: Path, evaluation: Evaluation) -> None:
    """Writes a CSV with id, label and probability of class 1, in the split's order.

    Probabilities have all digits of their float64, so that other programs get the same figures.
    """
    # Write to memory first, so that the file appears whole.
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    # csv writes the repr of Python's floats: the shortest text that reads back as the same float.
    columns = (map(csv_cell, evaluation.ids), evaluation.labels, evaluation.probabilities.tolist())
    writer.writerows([_HEAD, *zip(*columns, strict=True)])
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
        ids, str [N]; labels, uint8 [N]; and probabilities, float64 [N].

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with open_user_file(file) as stream:
            content = stream.read(_LONGEST + 1)
        if len(content) > _LONGEST:
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
    if next(rows, None) != _HEAD:
        raise ValueError("its first line is not id,label,probability")
    # Arrays take a tenth of the memory of lists of numbers.
    ids, labels, probabilities = [], array("B"), array("d")
    for name, label, probability in rows:
        ids.append(_text_of(name))
        labels.append(int(label))
        probabilities.append(float(probability))
    labels, probabilities = np.array(labels), np.array(probabilities)
    if (labels > 1).any() or not ((probabilities >= 0) & (probabilities <= 1)).all():  # NaN too
        raise ValueError("a label is not 0 or 1, or a probability is not in [0, 1]")
    if len(ids) * max(map(len, ids), default=0) > _MOST_LETTERS:
        raise ValueError("its ids are longer than this program reads")
    return np.array(ids, str), labels, probabilities


def _text_of(cell: str) -> str:
    """Returns the text from which `csv_cell` made the cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
