"""Reads slides with OpenSlide: the formats of scanners, DICOM and tiled TIFF.

OpenSlide is an extra of this package, so it is imported only where it is used.
"""

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from bef_jax.data.pictures.reading import LIMIT, on_white
from bef_jax.errors import UserError, reason_of
from bef_jax.slides.readers.base import Region, Slide, common_scale, levels_of, number

if TYPE_CHECKING:
    import openslide

_CACHE = 64 << 20  # bytes of decoded tiles that are kept for the neighbouring rectangles
_SMALLEST = (32, 32)  # pixels; what cannot be decoded is found by halving down to this
# Their tiles begin at the corner of a level, so that one tile fails as a whole.
_TILED = ("aperio", "dicom", "generic-tiff")


class Box(NamedTuple):
    """A rectangle of a level, in pixels of that level."""

    x: int
    y: int
    width: int
    height: int


def is_installed() -> bool:
    """Returns whether OpenSlide can be used here."""
    try:
        import openslide  # noqa: F401
    except (ImportError, OSError):  # OSError: its shared library is missing
        return False
    return True


def vendor_of(path: Path) -> str | None:
    """Returns OpenSlide's name of a file's format; None if it knows none, or isn't installed."""
    if not is_installed():
        return None
    import openslide

    try:
        return openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None


def series_of(path: Path) -> str | None:
    """Returns what tells the DICOM series of a file, whose files make one slide; else None."""
    if not is_installed():
        return None
    import openslide

    try:
        with openslide.OpenSlide(path) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None


class OpenSlideReader(Slide):
    """A slide that OpenSlide reads.

    After an error an OpenSlide handle refuses all further reads, good ones too. So the handle is
    opened again after each error. A handle is never closed by hand, because another thread may
    still read with it; it is closed when its last reference goes.
    """

    def __init__(self, path: Path, mpp: float | None) -> None:
        """Opens the slide; see `reader.open_slide`.

        Raises:
            UserError: OpenSlide cannot read it, or its pixels are not square.
        """
        import openslide

        self.path = path
        self._error = openslide.OpenSlideError
        self._lock = threading.Lock()
        try:
            self._cache = openslide.OpenSlideCache(_CACHE)  # of all handles of the slide together
            handle = self._new_handle()
            self._sizes, self._factors = handle.level_dimensions, handle.level_downsamples
        except (openslide.OpenSlideError, OSError) as error:
            raise UserError(f"{path}: cannot be read as a slide ({reason_of(error)})") from error
        self.levels = levels_of(path, list(self._sizes))
        self._handle = handle
        properties = handle.properties
        vendor = properties.get("openslide.vendor", "")
        self.mpp = mpp or common_scale(
            path, *(number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        )
        self.reader = f"openslide {vendor}"
        tiles = [_tile(properties, i) for i in range(len(self.levels))]
        if max(map(math.prod, tiles)) > LIMIT:
            # OpenSlide would end the process if there is no memory for a tile.
            raise UserError(f"{path}: its tiles are above {LIMIT:,} pixels; write it with others")
        # Elsewhere a piece that ends where a tile ends is read with pixels of the next tile.
        self._pieces = [
            tile if vendor in _TILED and factor.is_integer() and all(tile) else _SMALLEST
            for tile, factor in zip(tiles, self._factors, strict=True)
        ]

    def _new_handle(self) -> "openslide.OpenSlide":
        import openslide

        handle = openslide.OpenSlide(self.path)
        handle.set_cache(self._cache)
        return handle

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """See `Slide.read`."""
        handle, box = self._handle, Box(x, y, width, height)
        try:
            return Region(self._pixels(handle, level, box))
        except self._error:
            self._replace(handle)
        return self._read_decodable(level, box)

    def _replace(self, broken: "openslide.OpenSlide") -> None:
        """Opens the slide again for all threads, if none has done so yet."""
        with self._lock:
            if self._handle is broken:
                self._handle = self._open_again()

    def _open_again(self) -> "openslide.OpenSlide":
        try:
            handle = self._new_handle()
            is_same = handle.level_dimensions == self._sizes
        except (self._error, OSError) as error:
            raise UserError(
                f"{self.path}: can no longer be opened ({reason_of(error)}); run it again when the "
                "file is back"
            ) from error
        if not is_same:
            raise UserError(f"{self.path}: changed while it was read; run it again")
        return handle

    def _read_decodable(self, level: int, box: Box) -> Region:
        """Reads what can be decoded of a rectangle, with handles that no other thread uses.

        The first piece is the whole rectangle, because another thread may have had the error.
        """
        pixels = np.full((box.height, box.width, 3), 255, np.uint8)
        failed = np.zeros((box.height, box.width), bool)
        handle, pieces = self._open_again(), [box]
        while pieces:
            piece = pieces.pop()
            top, left = piece.y - box.y, piece.x - box.x
            place = np.s_[top : top + piece.height, left : left + piece.width]
            try:
                pixels[place] = self._pixels(handle, level, piece)
            except self._error:
                handle = self._open_again()
                parts = _halves(piece, self._pieces[level])
                failed[place] = not parts
                pieces += parts
        return Region(pixels, failed if failed.any() else None)

    def _pixels(self, handle: "openslide.OpenSlide", level: int, box: Box) -> np.ndarray:
        # OpenSlide divides by its own factor, which is the mean of those in x and y. Where it is no
        # whole number, the pixels are a mix with those beside them, off by up to half of 1/factor.
        factor = self._factors[level]
        place = (round(box.x * factor), round(box.y * factor))
        return _to_rgb(handle.read_region(place, level, (box.width, box.height)))

    def close(self) -> None:
        """See `Slide.close`."""
        self._handle = None


def _tile(properties: Mapping[str, str], level: int) -> tuple[int, int]:
    """Returns the width and height of a level's tiles, in pixels; 0 where they aren't known."""
    names = (f"openslide.level[{level}].tile-{side}" for side in ("width", "height"))
    return tuple(int(properties.get(name, 0)) for name in names)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an RGBA image on white, uint8 [H, W, 3]."""
    rgba = np.asarray(image)
    if rgba[..., 3].min() < 255:
        return np.asarray(on_white(image))
    pixels = np.empty((*rgba.shape[:2], 3), np.uint8)
    for channel in range(3):  # numpy copies pixels of 3 out of 4 bytes in four times as long
        pixels[..., channel] = rgba[..., channel]
    return pixels


def _halves(box: Box, tile: tuple[int, int]) -> list[Box]:
    """Returns the two halves of a rectangle, cut where tiles meet; [] if it lies in one tile."""
    x, y = _cut(box.x, box.width, tile[0]), _cut(box.y, box.height, tile[1])
    if x and (not y or box.width / tile[0] >= box.height / tile[1]):
        return [box._replace(width=x - box.x), box._replace(x=x, width=box.x + box.width - x)]
    if y:
        return [box._replace(height=y - box.y), box._replace(y=y, height=box.y + box.height - y)]
    return []


def _cut(start: int, length: int, step: int) -> int | None:
    """Returns the multiple of `step` inside of a length that is nearest to its middle, if any."""
    first, last = (start // step + 1) * step, (start + length - 1) // step * step
    middle = round((start + length / 2) / step) * step
    return min(max(middle, first), last) if first <= last else None
