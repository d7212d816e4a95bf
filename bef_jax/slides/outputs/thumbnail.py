"""A slide as a small picture."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from PIL import Image

from bef_jax.slides.reader import Slide

_READ = 2048  # pixels of a level that are read at once, in each direction


def thumbnail_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Returns the width and height to which a slide is reduced; small slides keep their size."""
    factor = max(1, max(width, height) / longest)
    return max(1, round(width / factor)), max(1, round(height / factor))


def read_thumbnail(slide: Slide, longest: int) -> np.ndarray:
    """Returns the whole slide, uint8 [H, W, 3], reduced so that no side is above `longest`.

    It reads the smallest level that is large enough, in parts, so that memory does not grow with
    the slide.

    Raises:
        UserError: the slide can no longer be opened.
    """
    whole = slide.levels[0]
    width, height = thumbnail_size(whole.width, whole.height, longest)
    number = max(
        i for i, each in enumerate(slide.levels) if each.width >= width and each.height >= height
    )
    level = slide.levels[number]
    small = np.empty((height, width, 3), np.uint8)
    for top, bottom in _parts(height, level.height):
        for left, right in _parts(width, level.width):
            box = np.array([left, top, right, bottom])
            box = box * np.tile([level.width / width, level.height / height], 2)
            small[top:bottom, left:right] = _read(slide, number, box, (right - left, bottom - top))
    return small


def _parts(count: int, length: int) -> Iterator[tuple[int, int]]:
    """Yields where parts of `count` pixels begin and end; `length` are read for all of them."""
    step = max(1, _READ * count // length)
    return pairwise([*range(0, count, step), count])


def _read(slide: Slide, level: int, box: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Reads a part of a level, and reduces it to `size`; `box` is in pixels of the level."""
    left, top = (math.floor(value) for value in box[:2])
    right = min(math.ceil(box[2]), slide.levels[level].width)
    bottom = min(math.ceil(box[3]), slide.levels[level].height)
    pixels = slide.read(level, left, top, right - left, bottom - top).pixels
    inside = np.minimum(box - np.tile([left, top], 2), np.tile([right - left, bottom - top], 2))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BOX, tuple(inside))
