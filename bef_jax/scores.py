"""What a model said of every patch of a split, kept for whoever wants other figures of it."""

import csv
import io
from pathlib import Path

import numpy as np

from bef_jax.metrics import Evaluation
from bef_jax.runtime.files import write_text

_HEAD = ["id", "label", "probability"]


def csv_cell(text: str) -> str:
    """Returns a cell that a spreadsheet shows as text: an apostrophe before what it would run."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_scores(file: Path, evaluation: Evaluation) -> None:
    """Writes a CSV with id, label and probability of class 1, in the split's order.

    Probabilities have all digits of their float64, so that other programs find the same figures.
    """
    # In memory first, so that the file appears whole.
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    # Python's floats, whose repr csv writes: the shortest text that reads back as the same.
    columns = (evaluation.ids, evaluation.labels, evaluation.probabilities.tolist())
    writer.writerows([_HEAD, *zip(*columns, strict=True)])
    write_text(file, text.getvalue())


def read_scores(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads what `write_scores` wrote: ids str [N], labels uint8 [N], probabilities float64 [N]."""
    with open(file, newline="") as rows:
        ids, labels, probabilities = zip(*list(csv.reader(rows))[1:], strict=True)
    return np.array(ids), np.array(labels, np.uint8), np.array(probabilities, np.float64)
