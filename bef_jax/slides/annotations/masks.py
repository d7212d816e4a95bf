"""Masks of tumour as TIFF, flat or with a pyramid; they are read part by part."""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile

from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import check_regular, open_user_file
from bef_jax.slides.annotations.annotation import Annotation

_MOST_IN_PART = 1 << 28  # pixels of a tile or strip, which is decoded as a whole
_MOST_KEPT = 1 << 25  # pixels of decoded parts that stay in memory
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_SAME_RATIO = 0.02  # by which the two sides of a mask may be scaled differently


class _Level(NamedTuple):
    """One level of a mask.

    Attributes:
        page: of the file.
        downsample: pixels of level 0 of the slide for each of its pixels, in x and y.
    """

    page: tifffile.TiffPage
    downsample: tuple[float, float]


def read_mask(path: Path, size: tuple[int, int]) -> "Mask":
    """Reads the header of a mask. Its size may be that of any level of the slide.

    Raises:
        UserError: it cannot be read, or has other proportions than the slide.
    """
    check_regular(path)
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [level.pages[0].aspage() for level in tiff.series[0].levels]
        return Mask(path, tuple(_Level(page, _downsample(path, page, size)) for page in pages))
    except UserError:
        raise
    except Exception as error:  # tifffile raises anything at a damaged file
        raise UserError(f"{path}: cannot be read as a mask ({reason_of(error)})") from error


def _downsample(path: Path, page: tifffile.TiffPage, size: tuple[int, int]) -> tuple[float, float]:
    width, height = page.imagewidth, page.imagelength
    # In a damaged file each of them can be a tuple or bytes.
    if not all(isinstance(side, int) for side in (width, height, *page.chunks)):
        raise UserError(f"{path}: is not a mask of numbers")
    part = math.prod(page.chunks)
    if page.dtype is None or page.dtype.kind not in "buif" or not width * height * part:
        raise UserError(f"{path}: is not a mask of numbers")
    if page.planarconfig != 1 and page.samplesperpixel > 1:
        raise UserError(f"{path}: has its channels one after the other; save one channel")
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        raise UserError(f"{path}: says that 0 is white; save it so that 0 is black")
    if part > _MOST_IN_PART:
        raise UserError(f"{path}: has a strip of {part:,} pixels; save it in tiles")
    x, y = _whole(size[0], width), _whole(size[1], height)
    if abs(x / y - 1) > _SAME_RATIO + 1 / min(width, height):
        raise UserError(
            f"{path}: {width}x{height} pixels do not fit a slide of {size[0]}x{size[1]}; give the "
            "mask of this slide"
        )
    return x, y


def _whole(length: int, shrunk: int) -> float:
    """Returns length / shrunk; or the whole number that gives `shrunk` after rounding.

    A power of two comes first, because several numbers may fit a mask of few pixels.
    """
    ratio = length / shrunk
    for factor in (2 ** round(math.log2(ratio)), round(ratio)):
        if factor >= 1 and math.floor(length / factor) <= shrunk <= math.ceil(length / factor):
            return float(factor)
    return ratio


class Mask(Annotation):
    """A mask: what is above 0 in one of its first three channels is tumour; alpha does not count.

    The file is open only while it is read.
    """

    def __init__(self, path: Path, levels: tuple[_Level, ...]) -> None:
        """Takes the levels, the largest first."""
        self.path = path
        self._levels = levels
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def area(
        self, x: float, y: float, scale: tuple[float, float], shape: tuple[int, int]
    ) -> np.ndarray:
        """Returns which pixels of a rectangle are tumour; see `Annotation.area`.

        A centre of a pixel has the value of the pixel that it lies in, in the coarsest level that
        is not coarser than the result.
        """
        # Levels are rounded to whole pixels, so that one may seem coarser by a little.
        fine = [i for i, each in enumerate(self._levels) if each.downsample[0] <= scale[0] * 1.01]
        number = fine[-1] if fine else 0
        page, downsample = self._levels[number]
        columns, rows = (
            np.floor((start + (np.arange(length) + 0.5) * step) / own).astype(int)
            for start, length, step, own in zip((x, y), shape[::-1], scale, downsample, strict=True)
        )
        found = np.zeros(shape, bool)
        for index, (top, left, height, width) in _parts(page, rows, columns):
            inside = np.ix_(
                np.flatnonzero((rows >= top) & (rows < top + height)),
                np.flatnonzero((columns >= left) & (columns < left + width)),
            )
            part = self._part(number, index)
            if part.any():
                found[inside] = part[rows[inside[0]] - top, columns[inside[1]] - left]
        return found

    def _part(self, level: int, index: int) -> np.ndarray:
        """Returns a tile or strip, bool [H, W]; parts that were used lately are kept."""
        key = level, index
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            # Decode without the lock, so that several threads can; two may decode the same part.
            found = self._decode(self._levels[level].page, index)
        with self._lock:
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(map(np.size, self._kept.values())) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return found

    def _decode(self, page: tifffile.TiffPage, index: int) -> np.ndarray:
        height, width = page.chunks[:2]
        try:
            count = page.databytecounts[index]
            if not count:  # an empty part of a sparse file
                return np.zeros((height, width), bool)
            with open_user_file(self.path) as stream:
                stream.seek(page.dataoffsets[index])
                data = stream.read(count)
            pixels = page.decode(data, index, jpegtables=page.jpegtables)[0]
        except UserError:
            raise
        except Exception as error:  # codecs raise anything at damaged data
            raise UserError(f"{self.path}: damaged ({reason_of(error)})") from error
        # A strip at the bottom may have fewer rows than the others.
        return np.pad(
            (pixels[0, ..., : _colours(page)] > 0).any(axis=-1),
            [(0, height - pixels.shape[1]), (0, width - pixels.shape[2])],
        )


def _colours(page: tifffile.TiffPage) -> int:
    """Returns how many of a pixel's first channels say whether it is tumour."""
    alphas = sum(kind in _ALPHA for kind in page.extrasamples)
    return min(3, max(1, page.samplesperpixel - alphas))


def _parts(
    page: tifffile.TiffPage, rows: np.ndarray, columns: np.ndarray
) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """Yields the parts that have some of the pixels: their number, top, left, height, width."""
    height, width = page.chunks[:2]
    across = math.ceil(page.imagewidth / width)
    for down in _used(rows, height, page.imagelength):
        for right in _used(columns, width, page.imagewidth):
            yield down * across + right, (down * height, right * width, height, width)


def _used(places: np.ndarray, side: int, length: int) -> list[int]:
    return np.unique(places[(places >= 0) & (places < length)] // side).tolist()
