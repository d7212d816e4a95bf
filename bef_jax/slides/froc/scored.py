"""Reads what a run of --mode=predict found in its slides."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from bef_jax.errors import UserError, printable, reason_of
from bef_jax.runtime.files import check_types, open_user_file, read_json
from bef_jax.scoring.probabilities_csv import csv_cell
from bef_jax.slides.annotations import LESION_CLASSES

_AGAIN = "run --mode=predict again"
_FARTHEST = 1e9  # pixels; no slide is as large


@dataclass(frozen=True)
class ScoredSlide:
    """A slide, and what was found in it.

    Attributes:
        name: of its folder in WORKDIR/slides.
        stem: its file below the input, without suffix, as the truth calls it. The name keeps the
            suffix where two slides would have the same name.
        size: width and height, in pixels of level 0.
        mpp: micrometres per pixel of level 0.
        score: that the slide has tumour.
        lesion_class: of the largest lesion that was found; one of `LESION_CLASSES`.
        detections: float64 [N, 3], x and y in pixels of level 0, and the probability.
    """

    name: str
    stem: str
    size: tuple[int, int]
    mpp: float
    score: float
    lesion_class: str
    detections: np.ndarray


def read_scored(workdir: Path) -> tuple[list[ScoredSlide], list[str]]:
    """Reads the scored slides of a workdir; returns them, and the names of those that failed.

    slides.csv lists the slides of the last run. Without it, all slides in slides/ count.

    Raises:
        UserError: a slide is not scored to its end, a file is damaged, or there are no slides.
    """
    folders = {_cell(folder, workdir): folder for folder in _folders(workdir)}
    try:
        is_done = _read_listing(workdir / "slides.csv")
    except FileNotFoundError:
        is_done = dict.fromkeys(folders, True)
    failed = [name for name, done in is_done.items() if not done]
    slides = []
    for name in (name for name, done in is_done.items() if done):
        if name not in folders:
            raise UserError(f"{workdir / 'slides' / name}: has no slide.json; {_AGAIN}")
        slide = _read_slide(folders[name], folders[name].relative_to(workdir / "slides").as_posix())
        # A slide without a window that can be read has no score.
        (slides if slide else failed).append(slide or name)
    if not slides:
        raise UserError(f"{workdir}: has no scored slides; give the --workdir of --mode=predict")
    return slides, failed


def _folders(workdir: Path) -> list[Path]:
    """Returns the folders of slides that are scored to their end."""
    top = workdir / "slides"
    done = {file.parent for file in top.rglob("slide.json")}
    begun = sorted(file.parent for file in top.rglob(".partial") if file.parent not in done)
    if begun:
        raise UserError(f"{begun[0]}: is not scored to its end; {_AGAIN}, or remove the folder")
    return sorted(done)


def _cell(folder: Path, workdir: Path) -> str:
    """Returns how slides.csv writes the name of a slide."""
    return csv_cell(printable(folder.relative_to(workdir / "slides").as_posix()))


def _read_listing(file: Path) -> dict[str, bool]:
    """Returns the slides of slides.csv, and whether they are done."""
    rows = _read_rows(file, ("name", "status"))
    return {row["name"]: row["status"] == "done" for row in rows}


def _read_rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open_user_file(file) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
            rows = list(csv.DictReader(text))
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: damaged ({reason_of(error)}); {_AGAIN}") from error
    if any(row.get(column) is None for row in rows for column in columns):
        raise UserError(f"{file}: damaged (a line lacks {' or '.join(columns)}); {_AGAIN}")
    return rows


def _read_slide(folder: Path, name: str) -> ScoredSlide | None:
    """Returns what was found in a slide; None if none of its windows could be read."""
    file = folder / "slide.json"
    found = read_json(file, _check, _AGAIN)
    if len(found["classes"]) != 2:
        raise UserError(f"{file}: has {len(found['classes'])} classes, but FROC is for two")
    if found["score"] is None and found["windows"]:
        return None
    return ScoredSlide(
        name,
        PurePosixPath(found["file"]).with_suffix("").as_posix(),
        (found["width"], found["height"]),
        float(found["mpp"]),
        float(found["score"] or 0),  # glass alone has no score; there is no tumour in it
        found["lesion_class"] or "none",
        _read_detections(folder / "detections.csv"),
    )


def _check(found: Any) -> None:
    check_types(found, width=int, height=int, mpp=float, windows=int, classes=list, file=str)
    check_types(found, score=int | float | None, lesion_class=str | None)
    if not 0 < found["mpp"] < math.inf or min(found["width"], found["height"]) < 1:
        raise ValueError("mpp, width or height is not above 0")
    if not PurePosixPath(found["file"]).name:
        raise ValueError(f"file is {found['file']!r}")
    if not 0 <= (found["score"] or 0) <= 1:
        raise ValueError(f"score is {found['score']}, not in 0 .. 1")
    if (found["lesion_class"] or "none") not in LESION_CLASSES:
        raise ValueError(f"lesion_class is {found['lesion_class']!r}")


def _read_detections(file: Path) -> np.ndarray:
    columns = ("x", "y", "probability")
    try:
        rows = _read_rows(file, columns)
        found = np.array([[float(row[key]) for key in columns] for row in rows]).reshape(-1, 3)
    except FileNotFoundError as error:
        raise UserError(f"{file}: is missing; {_AGAIN}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file}: damaged ({reason_of(error)}); {_AGAIN}") from error
    is_right = (np.abs(found) <= _FARTHEST).all(axis=1) & (found[:, 2] >= 0) & (found[:, 2] <= 1)
    if not is_right.all():  # this is also true for NaN
        raise UserError(f"{file}: damaged (row {np.argmin(is_right) + 1} is no point); {_AGAIN}")
    return found
