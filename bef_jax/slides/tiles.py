"""Where the windows of a slide lie: at the network's scale, and in pixels of level 0.

A window is the square that a tile decides, such as the middle 32 px of 96. Windows lie on a grid
whose first one begins at the slide's upper left corner. Those of the last row and column may reach
past its edge.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bef_jax.data.patch import SAME_SCALE, Tiling, same_scale
from bef_jax.errors import UserError
from bef_jax.slides.reader import Slide

BLOCK = 960  # pixels at the network's scale that are read at once, in each direction
_MOST_READ = 2048  # pixels of a level that a block may have in each direction, without margins
_MOST_TILE = 8192  # pixels of a level that a tile may take in each direction, 256 MB as RGBA
_ROUNDING = 1e-6  # of a pixel, from dividing lengths


@dataclass(frozen=True)
class Grid:
    """The windows of a slide.

    Attributes:
        tiling: sides and stride, in pixels at the network's scale.
        level: the level that is read.
        resize: pixels of that level for each pixel at the network's scale, in x and y; 1 if it is
            read as it is.
        scale: pixels of level 0 for each pixel at the network's scale, in x and y.
        width: of the slide at the network's scale, in pixels.
        height: the same.
        rows: number of rows of windows.
        columns: number of columns.
        mpp: micrometres per pixel of what the network sees.
    """

    tiling: Tiling
    level: int
    resize: tuple[float, float]
    scale: tuple[float, float]
    width: int
    height: int
    rows: int
    columns: int
    mpp: float

    @property
    def block(self) -> int:
        """Returns how many windows a block has in each direction."""
        reduced = min(1.0, _MOST_READ / (BLOCK * max(self.resize)))
        return max(1, int(BLOCK * reduced) // self.tiling.stride)

    def corners(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns x and y, float64 [N], of windows' upper left corners, in pixels of level 0."""
        stride = self.tiling.stride
        return columns * stride * self.scale[0], rows * stride * self.scale[1]

    @property
    def side(self) -> float:
        """Returns the side of a window in pixels of level 0."""
        return self.tiling.center * math.sqrt(self.scale[0] * self.scale[1])


class Block(NamedTuple):
    """Neighbouring windows that are read at once.

    Attributes:
        rows: numbers of the grid's rows.
        columns: numbers of the grid's columns.
    """

    rows: range
    columns: range


def make_grid(slide: Slide, tiling: Tiling, mpp: float) -> Grid:
    """Returns the windows of a slide for a network whose patches have `mpp` um per pixel.

    A level whose scale is within 8 % of that is read as it is. Otherwise the coarsest finer level
    is resampled.

    Raises:
        UserError: the slide does not say its scale, or is too coarse, or far too fine.
    """
    if not slide.mpp:
        raise UserError(
            f"{slide.path}: does not say its um per pixel; give --config.slides.mpp=..."
        )
    level, ratio = _choose_level(slide, mpp)
    if ratio * tiling.side > _MOST_TILE:
        raise UserError(
            f"{slide.path}: has {slide.mpp:.4g} um per pixel and no level near the network's "
            f"{mpp:.4g}, so each tile would take {ratio * tiling.side:,.0f} pixels in each "
            "direction; if that scale is wrong, give --config.slides.mpp=..."
        )
    found = slide.levels[level]
    width, height = (math.ceil(length / ratio - _ROUNDING) for length in found[:2])
    return Grid(
        tiling,
        level,
        resize=(ratio, ratio),
        scale=(found.downsample[0] * ratio, found.downsample[1] * ratio),
        width=width,
        height=height,
        rows=_count(height, tiling),
        columns=_count(width, tiling),
        mpp=_scale_of(slide, level) * ratio,
    )


def _choose_level(slide: Slide, mpp: float) -> tuple[int, float]:
    """Returns a level, and how many of its pixels become one pixel of `mpp` um, 1 or more.

    Raises:
        UserError: all levels are too coarse.
    """
    scales = [_scale_of(slide, level) for level in range(len(slide.levels))]
    near = [level for level, scale in enumerate(scales) if same_scale(scale, mpp)]
    if near:
        return min(near, key=lambda level: abs(math.log(scales[level] / mpp))), 1.0
    finer = [level for level, scale in enumerate(scales) if scale < mpp]
    if not finer:
        raise UserError(
            f"{slide.path}: has {slide.mpp:.4g} um per pixel, coarser than the network's {mpp:.4g} "
            f"by more than {SAME_SCALE - 1:.0%}; scan it at a finer scale, or, if that scale is "
            "wrong, give --config.slides.mpp=..."
        )
    level = max(finer, key=lambda level: scales[level])
    return level, mpp / scales[level]


def _scale_of(slide: Slide, level: int) -> float:
    """Returns micrometres per pixel of a level."""
    return slide.mpp * math.sqrt(math.prod(slide.levels[level].downsample))


def _count(length: int, tiling: Tiling) -> int:
    """Returns how many windows cover a length; each begins inside it."""
    if tiling.stride >= tiling.center:
        return math.ceil(length / tiling.stride)
    return math.ceil(max(length - tiling.center, 0) / tiling.stride) + 1


def block_rows(grid: Grid) -> Iterator[list[Block]]:
    """Yields the blocks of a slide, row by row, from left to right."""
    for top in range(0, grid.rows, grid.block):
        rows = range(top, min(top + grid.block, grid.rows))
        yield [
            Block(rows, range(left, min(left + grid.block, grid.columns)))
            for left in range(0, grid.columns, grid.block)
        ]


def mirrored(start: int, stop: int, length: int) -> np.ndarray:
    """Returns indices into `length` pixels for start .. stop - 1; outside is the mirror image."""
    if length == 1:
        return np.zeros(stop - start, int)
    index = np.arange(start, stop) % (2 * length - 2)
    return np.minimum(index, 2 * length - 2 - index)
