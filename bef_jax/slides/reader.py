"""Slides as pyramids of levels, whose regions are read one by one.

OpenSlide reads the formats of scanners, DICOM and tiled TIFF; tifffile reads other TIFF files.
"""

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bef_jax.errors import UserError, reason_of


class Level(NamedTuple):
    """One level of a pyramid.

    Attributes:
        width: in pixels.
        height: in pixels.
        downsample: pixels of level 0 for each of this level, in x and in y.
    """

    width: int
    height: int
    downsample: tuple[float, float]


class Region(NamedTuple):
    """The pixels of a rectangle.

    Attributes:
        pixels: uint8 [H, W, 3], RGB; what is transparent is white.
        failed: bool [H, W], what cannot be decoded; None if all can be.
    """

    pixels: np.ndarray
    failed: np.ndarray | None = None


class Slide(ABC):
    """An open slide; its regions may be read in several threads at once.

    Attributes:
        path: of the file.
        levels: the largest first.
        mpp: micrometres per pixel of level 0; None if neither the slide nor the user says it.
        reader: the name of the library that reads it, and the format, such as "openslide aperio".
    """

    path: Path
    levels: tuple[Level, ...]
    mpp: float | None
    reader: str

    @abstractmethod
    def read(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """Returns a rectangle of a level, in pixels of that level; it lies inside the level.

        Raises:
            UserError: the slide can no longer be opened.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes the file."""

    def __enter__(self) -> "Slide":
        """Returns the slide, which is closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()


def open_slide(path: Path, mpp: float | None = None) -> Slide:
    """Opens a slide.

    Args:
        path: of a slide, or of one of its files.
        mpp: micrometres per pixel of level 0, which then counts instead of what the slide says.

    Raises:
        UserError: no library can read it, or its pixels are not square.
    """
    return _OpenSlide(path, mpp)


class _OpenSlide(Slide):
    def __init__(self, path: Path, mpp: float | None):
        import openslide

        self.path = path
        self._lock = threading.Lock()
        try:
            self._handle = openslide.OpenSlide(str(path))
        except Exception as error:
            raise UserError(f"{path}: cannot be read as a slide ({reason_of(error)})") from error
        width, height = self._handle.dimensions
        self.levels = tuple(
            Level(w, h, (width / w, height / h)) for w, h in self._handle.level_dimensions
        )
        said = self._handle.properties.get("openslide.mpp-x")
        self.mpp = mpp or (said and float(said)) or None
        self.reader = f"openslide {self._handle.properties['openslide.vendor']}"

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        factors = self.levels[level].downsample
        place = (round(x * factors[0]), round(y * factors[1]))
        rgba = np.asarray(self._handle.read_region(place, level, (width, height)))
        pixels = np.where(rgba[..., 3:] > 0, rgba[..., :3], 255)
        return Region(np.ascontiguousarray(pixels, dtype=np.uint8))

    def close(self) -> None:
        self._handle.close()
