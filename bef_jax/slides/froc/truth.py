"""Where tumour truly is in the scored slides: reference.csv and annotations of a folder."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bef_jax.errors import UserError, listed
from bef_jax.slides.annotations import (
    SlideLabel,
    annotated_names,
    find_annotation,
    label_of,
    read_annotation,
    read_reference,
)
from bef_jax.slides.froc.lesions import Lesions, find_lesions
from bef_jax.slides.froc.scored import ScoredSlide

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truth:
    """The truth about a slide.

    Attributes:
        is_tumour: whether it has tumour.
        lesion_class: one of `annotations.LESION_CLASSES`, or None if it is not known.
        lesions: those of the annotation.
    """

    is_tumour: bool
    lesion_class: str | None
    lesions: Lesions


def read_truth(folder: Path, slides: Sequence[ScoredSlide]) -> Iterator[Truth]:
    """Yields the truth about each slide; memory holds the lesions of one at a time.

    A slide has tumour if reference.csv says so or, where it does not list the slide, if its
    annotation has tumour. Without reference.csv, a slide without annotation is normal.

    Raises:
        UserError: the folder or a file in it cannot be read, nothing is known of a slide, or what
            is known contradicts itself.
    """
    if not folder.is_dir():
        raise UserError(f"--truth={folder}: no such folder")
    reference = read_reference(folder)
    files = [find_annotation(folder, slide.stem) for slide in slides]
    _check_different(files, slides)
    _warn_of_others(folder, slides, reference or {})
    if reference is None and not any(files):
        LOG.warning("--truth=%s: has no annotation of a scored slide; all count as normal", folder)
    for slide, file in zip(slides, files, strict=True):
        yield _truth_of(folder, slide, file, reference)


def _truth_of(
    folder: Path, slide: ScoredSlide, file: Path | None, reference: dict[str, SlideLabel] | None
) -> Truth:
    label = label_of(reference, slide.stem)
    if label is None and file is None and reference is not None:
        raise UserError(f"{folder / 'reference.csv'}: lacks {slide.name}; add a line for it")
    if label and label.is_tumour and file is None:
        raise UserError(f"--truth={folder}: has no annotation of {slide.name}, which has tumour")
    annotation = read_annotation(file, slide.size) if file else None
    lesions = find_lesions(annotation, slide.size, slide.mpp)
    has_tumour = len(lesions.is_itc) > 0
    if label is None:
        return Truth(has_tumour, None, lesions)
    if has_tumour and not label.is_tumour:
        raise UserError(f"{file}: has tumour, but reference.csv calls the slide normal")
    if label.is_tumour and not has_tumour:
        LOG.warning("%s: has no tumour in the middle of a pixel of the mask", file)
    return Truth(label.is_tumour, label.lesion_class, lesions)


def _check_different(files: Sequence[Path | None], slides: Sequence[ScoredSlide]) -> None:
    owners: dict[Path, str] = {}
    for file, slide in zip(files, slides, strict=True):
        if file and owners.setdefault(file, slide.name) != slide.name:
            raise UserError(
                f"{file}: is the annotation of {owners[file]} and of {slide.name}; put each into a "
                "folder as the slides have it"
            )


def _warn_of_others(
    folder: Path, slides: Sequence[ScoredSlide], reference: dict[str, SlideLabel]
) -> None:
    """Warns of slides that the folder knows, but that were not scored."""
    scored = {part.casefold() for s in slides for part in (s.stem, PurePosixPath(s.stem).name)}
    known = set(reference) | annotated_names(folder)
    others = sorted(name for name in known if name.casefold() not in scored)
    if others:
        LOG.warning(
            "--truth=%s: has %d slides that were not scored: %s",
            folder,
            len(others),
            listed(others),
        )
