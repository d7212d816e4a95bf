"""tiles.csv.gz: a line for each window of a slide that has tissue."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bef_jax.errors import printable
from bef_jax.runtime import files
from bef_jax.scoring.probabilities_csv import csv_cell
from bef_jax.scoring.slide_scorer import Windows
from bef_jax.slides.tiles import Grid

# Level 1 of gzip is four times as fast as level 6, and makes files that are 5 % larger.
_LEVEL = 1


def write_tiles(file: Path, grid: Grid, windows: Iterable[Windows], classes: Sequence[str]) -> None:
    """Writes x and y of each window's upper left corner, its side, and its probability.

    All three are in pixels of level 0; x and y are whole. Probabilities have all digits of their
    float64, and those of windows that could not be decoded are empty. For more than two classes a
    line has the class with the greatest probability, and the probabilities of all classes.

    Args:
        windows: in their order.
    """
    columns, rows = grid.corners(np.arange(grid.rows), np.arange(grid.columns))
    # There are far fewer rows and columns than windows, so write their numbers once.
    left, top = ([f"{value:.0f}," for value in values] for values in (columns, rows))
    side = f"{round(grid.side, 2):.10g},"
    with files.replacing_gzip(file, _LEVEL) as out:
        out.write(_head(classes).encode())
        for part in windows:
            places = zip(part.rows.tolist(), part.columns.tolist(), strict=True)
            cells = _cells(part.probabilities, classes)
            lines = [
                f"{left[column]}{top[row]}{side}{cell}\n"
                for (row, column), cell in zip(places, cells, strict=True)
            ]
            out.write("".join(lines).encode())


def _head(classes: Sequence[str]) -> str:
    names = ["x", "y", "side"]
    if len(classes) == 2:
        return _line([*names, "probability"])
    return _line([*names, "class", *(printable(f"probability_{name}") for name in classes)])


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cells(probabilities: np.ndarray, classes: Sequence[str]) -> Iterator[str]:
    """Returns the end of each window's line."""
    # `repr` is the shortest text that reads back as the same float.
    if probabilities.ndim == 1:
        return (repr(p) if p == p else "" for p in probabilities.tolist())
    return _class_cells(probabilities, classes)


def _class_cells(probabilities: np.ndarray, classes: Sequence[str]) -> Iterator[str]:
    names = [_line([csv_cell(printable(name))]).rstrip("\n") for name in classes]
    failed = "," * len(classes)
    numbers = probabilities.argmax(axis=1).tolist()
    for number, row in zip(numbers, probabilities.tolist(), strict=True):
        is_known = row[0] == row[0]
        yield f"{names[number]},{','.join(map(repr, row))}" if is_known else failed
