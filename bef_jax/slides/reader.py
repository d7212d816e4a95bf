"""Slides as pyramids of levels, whose regions are read one by one.

OpenSlide reads the formats of scanners, DICOM and tiled TIFF; tifffile reads other TIFF files; and
Pillow reads large pictures.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from bef_jax.data import pictures
from bef_jax.data.patch import same_scale
from bef_jax.errors import UserError, install_command, reason_of
from bef_jax.runtime.files import check_regular, open_user_file
from bef_jax.slides.readers import of_picture, tiff_pages, with_openslide
from bef_jax.slides.readers.base import Level, Region, Slide
from bef_jax.slides.readers.of_picture import PictureReader
from bef_jax.slides.readers.with_openslide import OpenSlideReader
from bef_jax.slides.readers.with_tifffile import TiffReader

__all__ = [
    "SUFFIXES",
    "Level",
    "Region",
    "Slide",
    "find_slides",
    "is_result",
    "is_slide",
    "open_slide",
]

LOG = logging.getLogger(__name__)

# Files with these suffixes hold only slides. A TIFF may be a slide, a picture or a patch.
SUFFIXES = (
    ".svs",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".vms",
    ".vmu",
    ".bif",
    ".dcm",
    ".czi",
    ".svslide",
)
# What --mode=predict writes into the folder of a slide: pictures, and the table that comes first.
_RESULTS, _FIRST_RESULT = ("heatmap.png", "mask.png", "probability.tif"), "tiles.csv.gz"
_GENERIC = "generic-tiff"  # OpenSlide's name of a tiled TIFF that no scanner has marked


def open_slide(path: Path, mpp: float | None = None) -> Slide:
    """Opens a slide.

    Args:
        path: of a slide, or of one of its files.
        mpp: micrometres per pixel of level 0, which then counts instead of what the slide says.

    Raises:
        UserError: no library can read it, or its pixels are not square.
    """
    mpp = mpp or None
    is_tiff = _check(path)
    if not with_openslide.vendor_of(path):
        return _open_without(path, mpp, is_tiff)
    try:
        return OpenSlideReader(path, mpp)
    except UserError as error:
        if not is_tiff:
            raise
        return _second_try(path, mpp, error)


def _check(path: Path) -> bool:
    """Returns whether an existing regular file is a TIFF."""
    check_regular(path)
    try:
        return tiff_pages.is_tiff(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a slide ({reason_of(error)})") from error


def _second_try(path: Path, mpp: float | None, error: UserError) -> Slide:
    """Opens a TIFF that OpenSlide refuses, such as for its compression."""
    try:
        return TiffReader(path, mpp)
    except UserError:
        raise error from None


def _open_without(path: Path, mpp: float | None, is_tiff: bool) -> Slide:
    """Opens a file of which OpenSlide knows nothing."""
    if is_tiff:
        return TiffReader(path, mpp)
    if of_picture.pixel_count(path):
        return PictureReader(path, mpp)
    if not with_openslide.is_installed():
        raise UserError(
            f"{path}: OpenSlide is missing, which reads it; {install_command('slides')}"
        )
    folder = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and not folder.is_dir():
        raise UserError(f"{path}: its folder {folder} is missing; put it beside the file")
    raise UserError(
        f"{path}: cannot be read as a slide (OpenSlide: unknown format, or a part of it is missing "
        "or damaged); name another file, or remove this one"
    )


def is_slide(
    path: Path, side: int, mpp: float | None = None, slide_mpp: float | None = None
) -> bool:
    """Returns whether a file is read as a slide; otherwise it is a picture or a patch.

    Only its headers are read. A damaged file that has a suffix of slides is a slide, which
    `open_slide` refuses; a damaged file of another name is not.

    Args:
        path: of the file.
        side: of the network's patches, in pixels.
        mpp: micrometres per pixel of the network, if known.
        slide_mpp: micrometres per pixel of the slide's largest level, if the user says them.
    """
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with open_user_file(path) as file:
            start = file.read(4)
    except (UserError, OSError):
        return False
    if start not in tiff_pages.TIFF_STARTS:
        count = of_picture.pixel_count(path)
        return count > pictures.LIMIT if count else bool(with_openslide.vendor_of(path))
    facts = tiff_pages.look(path)
    vendor = with_openslide.vendor_of(path)
    if vendor not in (None, _GENERIC) or (facts and (facts.is_scanned or facts.levels > 1)):
        return True
    return bool(facts) and (
        _is_large_tiff(facts, side, mpp, slide_mpp) or _has_levels(path, vendor, facts)
    )


def _is_large_tiff(
    facts: tiff_pages.TiffFacts, side: int, mpp: float | None, slide_mpp: float | None
) -> bool:
    """Returns whether a flat TIFF is a slide by its size and scale."""
    if facts.width * facts.height > pictures.LIMIT:
        return True
    if slide_mpp:
        return max(facts.width, facts.height) > side
    is_other_scale = bool(mpp and facts.mpp) and not same_scale(facts.mpp, mpp)
    return is_other_scale and (facts.width, facts.height) != (side, side)


def _has_levels(path: Path, vendor: str | None, facts: tiff_pages.TiffFacts) -> bool:
    """Returns whether OpenSlide finds a pyramid where tifffile found one level."""
    if vendor != _GENERIC or facts.pages < 2:
        return False
    try:
        with OpenSlideReader(path, 1.0) as slide:
            return len(slide.levels) > 1
    except UserError:
        return False


def is_result(path: Path) -> bool:
    """Returns whether a picture or slide is a result of --mode=predict, which is no input.

    The workdir may lie inside the input.
    """
    return path.name in _RESULTS and (path.parent / _FIRST_RESULT).is_file()


def find_slides(
    path: Path, side: int, mpp: float | None = None, slide_mpp: float | None = None
) -> list[tuple[str, Path]]:
    """Returns the slides at `path`, sorted: itself, or those in a folder and the folders below.

    Args:
        path: a file of any suffix, or a folder, whose pictures and slides are looked at.
        side: see `is_slide`.
        mpp: see `is_slide`.
        slide_mpp: see `is_slide`.

    Returns:
        Names and paths. A name is the path from the folder on, with slashes and without suffix. It
        keeps the suffix where two would be equal, or one would lie in the folder of another.

    Raises:
        UserError: a folder cannot be listed.
    """
    names = [path.name]
    if path.is_dir():
        walk = pictures.walk(path, (*pictures.SUFFIXES, *SUFFIXES))
        names = [name for name, _ in walk if not is_result(path / name)]
    root = path if path.is_dir() else path.parent
    found = [name for name in names if is_slide(root / name, side, mpp, slide_mpp)]
    found = list(_one_of_each_series(root, found))
    return list(zip(_short_names(found), (root / name for name in found), strict=True))


def _one_of_each_series(root: Path, names: list[str]) -> Iterator[str]:
    """Yields the slides, and of those that are files of one DICOM series the first."""
    first: dict[str, str] = {}
    for name in names:
        series = with_openslide.series_of(root / name) if name.lower().endswith(".dcm") else None
        if series in first:
            LOG.info("%s: is of the same slide as %s", root / name, first[series])
            continue
        if series:
            first[series] = name
        yield name


def _short_names(names: list[str]) -> list[str]:
    """Returns the names without suffixes, but with them where they would not differ enough."""
    short, before = [_without_suffix(name) for name in names], None
    # A longer name may be one that another slide has without its suffix.
    while short != before:
        before, clashing = short, _clashing(short)
        pairs = zip(names, short, strict=True)
        short = [full if name in clashing else name for full, name in pairs]
    return short


def _clashing(names: list[str]) -> set[str]:
    """Returns which names two slides have, or are the folder of another."""
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    return {name for name, count in Counter(names).items() if count > 1 or name in folders}


def _without_suffix(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    stem = file.rpartition(".")[0]
    # Nothing but dots would be no name, or lead out of the folder.
    return f"{folder}{slash}{stem if stem.strip('.') else file}"
