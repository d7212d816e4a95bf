"""Finds the slides of a folder, their annotations, and what reference.csv says of them."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from bef_jax.data.sources.listing import SPLIT_NAMES, group_finder, split_folders
from bef_jax.data.sources.slides.files import find_files
from bef_jax.errors import UserError, listed, printable
from bef_jax.runtime.files import user_path
from bef_jax.slides.annotations import (
    MANY_USES,
    MASKS,
    POLYGONS,
    SlideLabel,
    find_annotation,
    is_called_mask,
    label_of,
    read_reference,
)
from bef_jax.slides.reader import find_slides

LOG = logging.getLogger(__name__)


class Found(NamedTuple):
    """A slide that was found.

    Attributes:
        path: of its file.
        name: see `slides.reader.find_slides`.
        group: what slides of one patient share; the name, if config.data.group is empty.
        split: train, valid or test; None if the folders do not say it.
        annotation: its annotation, if it has one.
        is_tumour: what reference.csv says; None if it does not list the slide.
    """

    path: Path
    name: str
    group: str
    split: str | None
    annotation: Path | None
    is_tumour: bool | None


def find_all(data: ConfigDict, mpp: float) -> list[Found]:
    """Returns the slides of config.data.dir, sorted by their names.

    Args:
        data: config.data.
        mpp: micrometres per pixel of the patches.

    Raises:
        UserError: there is no slide, a slide has no group, some but not all are in the folder of a
            split, an annotation is of no slide or of two, or reference.csv lacks a slide.
    """
    root = user_path(data.dir)
    slides = _find_slides(root, data, mpp)
    folder = _annotations_folder(data, root)
    slides = _without_annotations(slides, root, folder)
    annotations = {path: _annotation(path, root, folder) for path in slides.values()}
    _check_once(annotations)
    masks = set(annotations.values())
    slides = {name: path for name, path in slides.items() if path not in masks}
    _check_known(root, folder, slides.values(), masks)
    _report_others(root, folder, {*slides.values(), *masks})
    split_of = _splits(root, slides.values())
    group_of = group_finder(data.group) if data.group else None
    reference = read_reference(folder)
    return [
        Found(
            path,
            name,
            group_of(path.relative_to(root).as_posix()) if group_of else name,
            split_of[path],
            annotations[path],
            _label(_stem(path, root), annotations[path], reference, folder),
        )
        for name, path in sorted(slides.items())
    ]


def _find_slides(root: Path, data: ConfigDict, mpp: float) -> dict[str, Path]:
    """Returns the slides by name; masks that lie beside them are among these, too."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set config.data.dir to that of the slides")
    # Beside slides, each TIFF that is larger than a patch is a slide, as if its scale was given.
    found = find_slides(root, data.patch_size, mpp, data.slide_mpp or mpp)
    if not found:
        raise UserError(f"{root}: holds no slide; set config.data.dir to the folder of the slides")
    return dict(found)


def _report_others(root: Path, folder: Path, known: set[Path | None]) -> None:
    """Warns of TIFF files that are not read, such as damaged ones and single patches."""
    found = [path for path in find_files(root, MASKS) if path not in known]
    if others := [str(path) for path in found if folder == root or folder not in path.parents]:
        LOG.warning("%d files are no slides: %s", len(others), printable(listed(others)))


def _splits(root: Path, paths: Iterable[Path]) -> dict[Path, str | None]:
    """Returns the split of each slide: that of its first folder, if this has the name of one."""
    first = {path: path.relative_to(root).parts[0] for path in paths}
    folders = split_folders(root, sorted(set(first.values())))
    return {path: SPLIT_NAMES[name.lower()] if folders else None for path, name in first.items()}


# ---- annotations --------------------------------------------------------------------------------


def _annotations_folder(data: ConfigDict, root: Path) -> Path:
    """Returns the folder of the annotations; it is `root` if they lie beside the slides."""
    folder = user_path(data.annotations) if data.annotations else root
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; set config.data.annotations to that of the annotations, or "
            "leave it empty if they lie beside the slides"
        )
    return root if folder.samefile(root) else folder


def _without_annotations(slides: dict[str, Path], root: Path, folder: Path) -> dict[str, Path]:
    """Returns the slides that are not in the folder of the annotations, which may lie in `root`."""
    if folder == root or not folder.resolve().is_relative_to(root.resolve()):
        return slides
    inside = folder.resolve().relative_to(root.resolve())
    return {
        name: path
        for name, path in slides.items()
        if not path.relative_to(root).is_relative_to(inside)
    }


def _annotation(path: Path, root: Path, folder: Path) -> Path | None:
    return find_annotation(folder, _stem(path, root), path)


def _stem(path: Path, root: Path) -> str:
    """Returns how annotations and reference.csv call a slide.

    Its name keeps the suffix where two slides would have the same name.
    """
    return path.relative_to(root).with_suffix("").as_posix()


def _check_once(annotations: dict[Path, Path | None]) -> None:
    """Raises UserError if two slides have one annotation, which can only be of one of them."""
    first: dict[Path, Path] = {}
    for slide, annotation in annotations.items():
        if annotation and (other := first.setdefault(annotation, slide)) != slide:
            raise UserError(
                f"{annotation}: could be of {other} and of {slide}; give the slides other names, "
                "or put the annotations into folders as the slides are"
            )


def _check_known(root: Path, folder: Path, paths: Iterable[Path], known: set[Path | None]) -> None:
    """Raises UserError if an annotation is of no slide: a tumour would count as normal tissue."""
    slides = {path.resolve() for path in paths}
    for path in find_files(folder, POLYGONS + MASKS):
        is_mask = path.name.lower().endswith(MASKS)
        # Beside the slides, another TIFF may be a picture of anything.
        if is_mask and (path.resolve() in slides or folder == root) and not is_called_mask(path):
            continue
        # A .json may be anything, such as the notes of a program that showed the slide.
        if path not in known and not path.name.lower().endswith(MANY_USES):
            raise UserError(
                f"{path}: is the annotation of no slide in {root}; give it the name of its slide, "
                "or move it away"
            )


def _label(
    name: str,
    annotation: Path | None,
    reference: dict[str, SlideLabel] | None,
    folder: Path,
) -> bool | None:
    """Returns whether reference.csv says that a slide has tumour; None if it lacks the slide."""
    found = label_of(reference, name)
    if reference is not None and not found and not annotation:
        raise UserError(f"{folder / 'reference.csv'}: lacks {name}; add a line for it")
    return found.is_tumour if found else None
