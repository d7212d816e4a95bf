"""Reads reference.csv: which slides have tumour, and how large the largest metastasis is."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bef_jax.data import pictures
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file
from bef_jax.slides.reader import SUFFIXES

# By the longest diameter; ITC: isolated tumour cells.
LESION_CLASSES = ("none", "ITC", "micro", "macro")
_CLASSES = {name.casefold(): name for name in LESION_CLASSES}
_FILE = "reference.csv"
_LONGEST = 1 << 24  # bytes, some 400,000 slides
_TUMOUR = ("tumor", "tumour", "positive", "metastasis", "1")
_NORMAL = ("normal", "negative", "0")
_NAME_COLUMNS = ("name", "image", "slide", "file", "filename", "patient")
_LABEL_COLUMNS = ("type", "label", "tumor", "tumour")
_CLASS_COLUMNS = ("class", "stage", "lesion_class")
# Of the columns without a head: the name and the label, and the class in CAMELYON16's file.
_PLACES = (0, 1, 3)


class SlideLabel(NamedTuple):
    """The truth about a whole slide.

    Attributes:
        is_tumour: whether it has tumour.
        lesion_class: one of `LESION_CLASSES`, or None if the file does not say it.
    """

    is_tumour: bool
    lesion_class: str | None = None


def read_reference(folder: Path) -> dict[str, SlideLabel] | None:
    """Reads reference.csv of a folder; returns the slides by name, or None if there is no file.

    A name is without the suffix of a slide. CAMELYON16's lines are `test_001,Tumor,IDC,Macro`, and
    CAMELYON17's `patient_000_node_0.tif,micro`, among lines for patients, which are left out. A
    head may name the columns: name, image or slide; type or label; class or stage.

    Raises:
        UserError: it cannot be read, a label or a class is unknown, or a slide occurs twice.
    """
    file = folder / _FILE
    try:
        with open_user_file(file) as stream:
            content = stream.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise UserError(f"{file}: is longer than {_LONGEST >> 20} MiB; name another folder")
        text = io.StringIO(content.decode("utf-8-sig"))
        rows = [[cell.strip() for cell in row] for row in csv.reader(text) if row]
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({reason_of(error)})") from error
    found: dict[str, SlideLabel] = {}
    for name, label in _labels(rows, file):
        if name in found:
            raise UserError(f"{file}: {name} occurs twice; keep one line")
        found[name] = label
    return found


def label_of(reference: dict[str, SlideLabel] | None, name: str) -> SlideLabel | None:
    """Returns what reference.csv says of a slide, which it may call by its file's name alone.

    Args:
        reference: as `read_reference` returns it.
        name: the slide's file without suffix, with the folders that it lies in.
    """
    known = reference or {}
    return known.get(name) or known.get(PurePosixPath(name).name)


def _labels(rows: list[list[str]], file: Path) -> Iterator[tuple[str, SlideLabel]]:
    places, body = _columns(rows, file)
    for row in body:
        name, label, lesion_class = (
            row[place] if place is not None and place < len(row) else "" for place in places
        )
        if not name.lower().endswith(".zip"):  # a patient of CAMELYON17
            yield _without_suffix(name), _label(label, lesion_class, f"{file}: {name}")


def _columns(
    rows: list[list[str]], file: Path
) -> tuple[tuple[int, int, int | None], list[list[str]]]:
    """Returns where name, label and class stand, and the rows without the head."""
    head = [cell.casefold() for cell in rows[0]] if rows else []
    if not set(head) & set(_NAME_COLUMNS):
        return _PLACES, rows
    name, label, lesion_class = (
        next((head.index(each) for each in known if each in head), None)
        for known in (_NAME_COLUMNS, _LABEL_COLUMNS, _CLASS_COLUMNS)
    )
    if label is None and lesion_class is None:
        raise UserError(f"{file}: has no column type, label, class or stage; add one")
    # A class alone says whether there is tumour.
    return (name, lesion_class if label is None else label, lesion_class), rows[1:]


def _label(label: str, lesion_class: str, where: str) -> SlideLabel:
    label, lesion_class = label.casefold(), lesion_class.casefold()
    if label in _CLASSES or label == "negative":
        name = _CLASSES.get(label, "none")
        return SlideLabel(name != "none", name)
    if label not in (*_TUMOUR, *_NORMAL):
        raise UserError(f"{where} has the label {label!r}; write tumor, normal or a class")
    is_tumour = label in _TUMOUR
    if not is_tumour:
        lesion_class = lesion_class or "none"
    if lesion_class not in ("", *_CLASSES):
        listed = ", ".join(LESION_CLASSES)
        raise UserError(f"{where} has the class {lesion_class!r}; write one of {listed}")
    if lesion_class and is_tumour == (lesion_class == "none"):
        raise UserError(f"{where} is called {label} and {lesion_class}; correct one of them")
    return SlideLabel(is_tumour, _CLASSES.get(lesion_class))


def _without_suffix(name: str) -> str:
    is_slide = name.lower().endswith((*pictures.SUFFIXES, *SUFFIXES))
    return str(PurePosixPath(name).with_suffix("")) if is_slide else name
