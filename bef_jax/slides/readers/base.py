"""What every reader of slides offers, and the scale that slides say."""

import logging
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bef_jax.data.patch import SAME_SCALE
from bef_jax.errors import UserError

LOG = logging.getLogger(__name__)

_WARNED = 1.01  # ratio of the two scales of a pixel above which a warning is logged
_STRETCHED = 2  # ratio of a level's two downsamples; more than the rounding of small levels
_SCALES = (1e-3, 1e5)  # um/px that are believed at all


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


def levels_of(path: Path, sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Returns the levels that have these widths and heights.

    Raises:
        UserError: there is none, one has no pixels, or they cannot be of one picture.
    """
    if not sizes or min(map(min, sizes)) < 1:
        raise UserError(f"{path}: has no pixels to read; name the file of the slide itself")
    width, height = sizes[0]
    levels = tuple(Level(w, h, (width / w, height / h)) for w, h in sizes)
    if any(max(level.downsample) > _STRETCHED * min(level.downsample) for level in levels):
        raise UserError(f"{path}: damaged (its levels have other shapes); write it again")
    return levels


def common_scale(path: Path, x: float | None, y: float | None) -> float | None:
    """Returns the micrometres per pixel that stand for both axes; None if they aren't known.

    Args:
        path: of the slide, for messages.
        x: micrometres per pixel in x, as the slide says it; it may be nonsense.
        y: the same in y.

    Raises:
        UserError: pixels are not square by more than 8 %.
    """
    known = [each for each in (x, y) if each and _SCALES[0] <= each <= _SCALES[1]]
    if not known:
        return None
    ratio = max(known) / min(known)
    if ratio > SAME_SCALE:
        raise UserError(
            f"{path}: its pixels are not square ({x:.4g} x {y:.4g} um); resample it, or give "
            "--config.slides.mpp=... if what it says is wrong"
        )
    if ratio > _WARNED:
        LOG.warning("%s: its pixels are not quite square (%.4g x %.4g um)", path, x, y)
    return math.sqrt(max(known) * min(known))


def number(text: str | None) -> float | None:
    """Returns the number that a text is, if it is one."""
    try:
        return float(text) if text else None
    except ValueError:
        return None
