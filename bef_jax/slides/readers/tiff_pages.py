"""The pages of a TIFF file that are the levels of a slide, and the scale that it says."""

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import tifffile

from bef_jax.data.pictures.reading import TIFF_STARTS
from bef_jax.data.pictures.scale import is_microscopic, mpp_of_tags
from bef_jax.runtime.files import open_user_file
from bef_jax.slides.readers.base import number

_MOST_PAGES = 100  # that are looked at; a stack of images can have thousands
_SAME_SHAPE = 0.02  # by which the ratio of width and height may differ between levels
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_NUMBER = r"([0-9.]+(?:[eE][-+]?[0-9]+)?)"
_APERIO = re.compile(rf"\bMPP\s*=\s*{_NUMBER}")
_OME = re.compile(rf'\bPhysicalSize([XY])="{_NUMBER}"')
_OME_UNIT = re.compile(r'\bPhysicalSizeXUnit="([^"]*)"')
_OME_UNITS = {"nm": 1e-3, "mm": 1e3}  # in micrometres, which are the default


class TiffFacts(NamedTuple):
    """What the headers of a TIFF file say.

    Attributes:
        width: of the largest level, in pixels.
        height: the same.
        levels: number of levels.
        mpp: micrometres per pixel of the largest level; None unless they are a microscope's.
        is_scanned: a scanner's format, by tifffile's knowledge.
        pages: number of pages, at most 100.
    """

    width: int
    height: int
    levels: int
    mpp: float | None
    is_scanned: bool
    pages: int


def is_tiff(path: Path) -> bool:
    """Returns whether a file begins as a TIFF does."""
    with open_user_file(path) as file:
        return file.read(4) in TIFF_STARTS


def look(path: Path) -> TiffFacts | None:
    """Returns what the headers of a TIFF file say; None if they cannot be read."""
    try:
        with open_user_file(path) as file, tifffile.TiffFile(file) as tif:
            return _facts(tif)
    except Exception:  # a damaged file can raise almost any error there
        return None


def _facts(tif: tifffile.TiffFile) -> TiffFacts:
    found = levels(tif)
    x, y = scales(tif)
    mpp = math.sqrt(x * y) if x and y and is_microscopic(x) else None
    is_scanned = found[0].is_tiled and (tif.is_svs or tif.is_bif or tif.is_scn or tif.is_philips)
    pages = len(list(itertools.islice(tif.pages, _MOST_PAGES)))
    return TiffFacts(
        found[0].imagewidth,
        found[0].imagelength,
        len(found),
        mpp,
        bool(is_scanned or tif.is_ndpi),
        pages,
    )


def levels(tif: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Returns the pages that are the levels of the first image, the largest first.

    They are the first page, and those after it, or in its SubIFDs, that are smaller and of the same
    shape. Of the pages after it only tiled ones count, because others are thumbnails and labels.
    """
    found = [tif.pages[0]]
    if not _has_sizes(found[0]):
        raise ValueError("its sizes are no numbers")
    after = [page for page in itertools.islice(tif.pages, 1, _MOST_PAGES) if page.is_tiled]
    below = itertools.islice(tif.pages[0].pages or (), _MOST_PAGES)
    for page in [*below, *after]:
        if _is_level(page, found):
            found.append(page)
    return found


def _is_level(page: tifffile.TiffPage, larger: list[tifffile.TiffPage]) -> bool:
    first, last = larger[0], larger[-1]
    if not _has_sizes(page) or (page.dtype, page.samplesperpixel) != (
        first.dtype,
        first.samplesperpixel,
    ):
        return False
    # A page without pixels is no level.
    if not 0 < page.imagewidth < last.imagewidth or not 0 < page.imagelength < last.imagelength:
        return False
    width = first.imagewidth * page.imagelength / first.imagelength
    height = first.imagelength * page.imagewidth / first.imagewidth
    # Small levels are rounded by up to a pixel in each direction.
    off = min(abs(width - page.imagewidth), abs(height - page.imagelength))
    return off <= max(1.0, _SAME_SHAPE * min(page.imagewidth, page.imagelength))


def _has_sizes(page: tifffile.TiffPage) -> bool:
    """Returns whether the sizes of a page are whole numbers; damaged tags give other things."""
    sizes = (page.imagewidth, page.imagelength, page.tilewidth, page.tilelength, page.rowsperstrip)
    return all(isinstance(size, int) for size in (*sizes, page.samplesperpixel))


def scales(tif: tifffile.TiffFile) -> tuple[float | None, float | None]:
    """Returns the micrometres per pixel in x and y: of OME, of Aperio, or of the tags."""
    page = tif.pages[0]
    if tif.is_ome and (found := dict(_OME.findall(page.description))):
        unit = _OME_UNIT.search(page.description)
        factor = _OME_UNITS.get(unit[1], 1.0) if unit else 1.0
        x, y = ((number(found.get(axis)) or 0) * factor or None for axis in "XY")
        return x or y, y or x
    if aperio := _APERIO.search(page.description):
        return number(aperio[1]), number(aperio[1])
    x, y, unit = (
        page.tags.valueof(tag) for tag in (_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT)
    )
    return _of_tag(x, unit), _of_tag(y, unit)


def _of_tag(resolution: tuple[int, int] | None, unit: int | None) -> float | None:
    pixels = resolution and resolution[0] / max(resolution[1], 1)
    return mpp_of_tags(pixels, unit and int(unit))
