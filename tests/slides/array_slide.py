"""Slides that tests paint: in memory, or as a file with the same levels."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile

from bef_jax.data.patch import Tiling
from bef_jax.scoring.slide_scorer import Windows, score_row
from bef_jax.slides.reader import Level, Region, Slide
from bef_jax.slides.tiles import Grid, block_rows, make_grid

TILING = Tiling(side=96, center=32, stride=32)
MPP = 0.972  # of PCam's patches
_TILE = 512  # pixels


class ArraySlide(Slide):
    """A slide whose levels, uint8 [H, W, 3] each, are in memory.

    Attributes:
        size: width and height that level 0 would have; that of the first level by default.
        failed: bool [H, W] of the first level, which cannot be decoded there.
    """

    path, reader = Path("painted.svs"), "memory"

    def __init__(
        self,
        *levels: np.ndarray,
        mpp: float = MPP,
        size: tuple[int, int] | None = None,
        failed: np.ndarray | None = None,
    ) -> None:
        width, height = size or levels[0].shape[1::-1]
        self.arrays, self.mpp, self.failed = levels, mpp, failed
        sizes = [each.shape[1::-1] for each in levels]
        self.levels = tuple(Level(w, h, (width / w, height / h)) for w, h in sizes)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        whole = self.arrays[level]
        assert 0 <= x < x + width <= whole.shape[1]
        assert 0 <= y < y + height <= whole.shape[0]
        area = slice(y, y + height), slice(x, x + width)
        return Region(whole[area].copy(), None if self.failed is None else self.failed[area])

    def close(self) -> None:
        """Does nothing."""


def write_levels(path: Path, levels: Sequence[np.ndarray | tuple[int, int]], mpp: float) -> Path:
    """Writes a pyramid of levels, without loss, as OpenSlide opens it; returns its path.

    Args:
        levels: uint8 [H, W, 3] each; of a white one, width and height are enough.
        mpp: micrometres per pixel of level 0.
    """
    with tifffile.TiffWriter(path) as tif:
        for number, level in enumerate(levels):
            is_white = isinstance(level, tuple)
            tif.write(
                _white_tiles(*level) if is_white else level,
                shape=(*level[::-1], 3) if is_white else level.shape,
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="deflate",
                compressionargs={"level": 1},
                subfiletype=min(number, 1),
                resolution=(10_000 / mpp, 10_000 / mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def _white_tiles(width: int, height: int) -> Iterator[bytes]:
    tile = zlib.compress(np.full((_TILE, _TILE, 3), 255, np.uint8).tobytes())
    return itertools.repeat(tile, -(-width // _TILE) * -(-height // _TILE))


def score(
    slide: Slide,
    read_tile: Callable[[np.ndarray], object],
    tiling: Tiling = TILING,
    mpp: float = MPP,
    classes: int = 2,
) -> tuple[Grid, Windows]:
    """Returns the grid of a slide, and what `read_tile` says about each tile with tissue."""
    grid = make_grid(slide, tiling, mpp)

    def predict(tiles):
        found = [np.asarray(read_tile(tile), float) for tile in tiles]
        if found:
            yield np.stack(found)

    rows = [score_row(predict, slide, grid, blocks, classes) for blocks in block_rows(grid)]
    names = ("rows", "columns", "probabilities")
    return grid, Windows(*(np.concatenate([getattr(row, name) for row in rows]) for name in names))
