"""Reads a slide block by block, at the network's scale, with what its windows need around them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bef_jax.data.patch import Tiling
from bef_jax.slides.reader import Region, Slide
from bef_jax.slides.tiles import Block, Grid, mirrored
from bef_jax.slides.tissue import is_coloured


@dataclass(frozen=True)
class ReadBlock:
    """The pixels of a block, and what is known of its windows before they are scored.

    Attributes:
        block: which windows it has.
        pixels: uint8 [H, W, 3] at the network's scale, with half a tile's margin on each side.
        tissue: bool [rows, columns], windows that have tissue, or whose tile cannot be decoded.
        failed: bool [rows, columns], windows whose tile cannot be decoded.
    """

    block: Block
    pixels: np.ndarray
    tissue: np.ndarray
    failed: np.ndarray

    def tile(self, row: int, column: int, grid: Grid) -> np.ndarray:
        """Returns the tile of a window, uint8 [S, S, 3], a view.

        Args:
            row: of the grid, in the block's rows.
            column: the same.
        """
        stride, side = grid.tiling.stride, grid.tiling.side
        y = (row - self.block.rows.start) * stride
        x = (column - self.block.columns.start) * stride
        return self.pixels[y : y + side, x : x + side]


def read_blocks(slide: Slide, grid: Grid, blocks: Sequence[Block]) -> Iterator[ReadBlock]:
    """Yields blocks in their order, read ahead by several threads."""
    for block in blocks:
        yield read_block(slide, grid, block)


def read_block(slide: Slide, grid: Grid, block: Block) -> ReadBlock:
    """Reads one block.

    Raises:
        UserError: the slide can no longer be opened.
    """
    tiling = grid.tiling
    margin = (tiling.side - tiling.center) // 2
    (top, bottom), (left, right) = (
        (
            each.start * tiling.stride - margin,
            (each.stop - 1) * tiling.stride + tiling.side - margin,
        )
        for each in (block.rows, block.columns)
    )
    y0, y1 = max(top, 0), min(bottom, grid.height)
    x0, x1 = max(left, 0), min(right, grid.width)
    region = _read_scaled(slide, grid, x0, y0, x1, y1)
    rows, columns = mirrored(top, bottom, grid.height) - y0, mirrored(left, right, grid.width) - x0
    # A mirror image may lie outside of what was read only for slides below a tile; clip it.
    rows, columns = np.clip(rows, 0, y1 - y0 - 1), np.clip(columns, 0, x1 - x0 - 1)
    pixels = region.pixels[rows[:, None], columns]
    inside = np.zeros(pixels.shape[:2], bool)
    inside[y0 - top : y1 - top, x0 - left : x1 - left] = True
    coloured = is_coloured(pixels) & inside
    shape = len(block.rows), len(block.columns)
    tissue = _any(coloured, shape, tiling.stride, margin, tiling.center)
    failed = np.zeros(shape, bool)
    if region.failed is not None:
        bad = region.failed[rows[:, None], columns]
        failed = _any(bad, shape, tiling.stride, 0, tiling.side)
    return ReadBlock(block, pixels, tissue | failed, failed)


def _extent(windows: range, tiling: Tiling) -> tuple[int, int]:
    """Returns where the tiles of some rows or columns begin and end, at the network's scale."""
    first = windows.start * tiling.stride - (tiling.side - tiling.center) // 2
    return first, first + (len(windows) - 1) * tiling.stride + tiling.side


def _any(
    mask: np.ndarray, shape: tuple[int, int], stride: int, first: int, side: int
) -> np.ndarray:
    """Returns whether a square has a pixel of `mask`, bool [rows, columns]."""
    found = np.empty(shape, bool)
    for row in range(shape[0]):
        for column in range(shape[1]):
            y, x = first + row * stride, first + column * stride
            found[row, column] = mask[y : y + side, x : x + side].any()
    return found


def _read_scaled(slide: Slide, grid: Grid, x0: int, y0: int, x1: int, y1: int) -> Region:
    """Reads a rectangle, given in pixels at the network's scale."""
    level, (fx, fy) = slide.levels[grid.level], grid.resize
    if (fx, fy) == (1.0, 1.0):
        return slide.read(grid.level, x0, y0, x1 - x0, y1 - y0)
    margin = 2 * math.ceil(max(fx, fy))
    left, top = max(0, math.floor(x0 * fx) - margin), max(0, math.floor(y0 * fy) - margin)
    right = min(level.width, math.ceil(x1 * fx) + margin)
    bottom = min(level.height, math.ceil(y1 * fy) + margin)
    region = slide.read(grid.level, left, top, right - left, bottom - top)
    box = (
        x0 * fx - left,
        y0 * fy - top,
        min(x1 * fx - left, right - left),
        min(y1 * fy - top, bottom - top),
    )
    size = (x1 - x0, y1 - y0)
    pixels = Image.fromarray(region.pixels).resize(size, Image.Resampling.BICUBIC, box)
    failed = region.failed
    if failed is not None:
        failed = np.asarray(Image.fromarray(failed).resize(size, Image.Resampling.BOX, box)) > 0
    return Region(np.asarray(pixels), failed)
