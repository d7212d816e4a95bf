"""Reads a slide block by block, at the network's scale, with what its windows need around them.

`read_blocks` reads ahead in threads, and tells `wait` for how many seconds its caller had to wait
for each block. Reading adds at most their sum to the time of a run, because a device may work on an
earlier batch meanwhile.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from bef_jax.data.patch import Tiling
from bef_jax.runtime.devices import cores
from bef_jax.slides.reader import Region, Slide
from bef_jax.slides.tiles import Block, Grid, mirrored
from bef_jax.slides.tissue import is_coloured

_THREADS = 4  # at most; more would only hold more blocks in memory
_BICUBIC = 2  # pixels to each side that Pillow's filter reads, times the reduction


@dataclass(frozen=True, eq=False)
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


def read_blocks(
    slide: Slide,
    grid: Grid,
    blocks: Iterable[Block],
    wait: Callable[[float], object] = lambda seconds: None,
) -> Iterator[ReadBlock]:
    """Yields blocks in their order, read ahead by at most four threads.

    Memory holds two blocks per thread at most, with the one that was yielded last. When the
    generator ends, or is closed early, its threads have ended, too.

    Args:
        slide: is read by several threads at once.
        grid: of the slide.
        blocks: of the grid, which are asked for only when they are to be read.
        wait: is called with the seconds that the caller waited, for each block.

    Raises:
        UserError: the slide can no longer be opened; blocks before that are yielded first.
    """
    threads = min(_THREADS, cores())
    started: deque[Future[ReadBlock]] = deque()
    with ThreadPoolExecutor(threads, "slide") as pool:
        try:
            for block in blocks:
                started.append(pool.submit(read_block, slide, grid, block))
                if len(started) == 2 * threads:
                    yield _finished(started, wait)
            while started:
                yield _finished(started, wait)
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(started: deque[Future[ReadBlock]], wait: Callable[[float], object]) -> ReadBlock:
    """Waits for the first block, and removes it, so that its memory is the caller's alone."""
    start = time.perf_counter()
    read = started.popleft().result()
    wait(time.perf_counter() - start)
    return read


def read_block(slide: Slide, grid: Grid, block: Block) -> ReadBlock:
    """Reads one block.

    Raises:
        UserError: the slide can no longer be opened.
    """
    y = _shown(block.rows, grid.tiling, grid.height)
    x = _shown(block.columns, grid.tiling, grid.width)
    rows, columns = (range(int(each.min()), int(each.max()) + 1) for each in (y, x))
    pixels, failed = _read_scaled(slide, grid, rows, columns)
    pixels = _expanded(pixels, y, x)
    tissue = _has_tissue(pixels, grid, block)
    if failed is None:
        return ReadBlock(block, pixels, tissue, np.zeros_like(tissue))
    bad = _in_squares(_expanded(failed, y, x), tissue.shape, grid.tiling.stride, grid.tiling.side)
    return ReadBlock(block, pixels, tissue | bad, bad)


def _shown(windows: range, tiling: Tiling, length: int) -> np.ndarray:
    """Returns which pixels the tiles of some rows or columns show, at the network's scale, int."""
    first = windows.start * tiling.stride - (tiling.side - tiling.center) // 2
    return mirrored(first, first + (len(windows) - 1) * tiling.stride + tiling.side, length)


def _has_tissue(pixels: np.ndarray, grid: Grid, block: Block) -> np.ndarray:
    """Returns which windows have tissue, bool [rows, columns]."""
    side, center, stride = grid.tiling
    margin = (side - center) // 2
    height, width = pixels.shape[:2]
    found = is_coloured(pixels[margin : height - margin, margin : width - margin])
    # The mirror image outside the slide is no tissue.
    found[max(grid.height - block.rows.start * stride, 0) :] = False
    found[:, max(grid.width - block.columns.start * stride, 0) :] = False
    return _in_squares(found, (len(block.rows), len(block.columns)), stride, center)


def _expanded(array: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns `array` [H, W, ...] with its mirror image around it.

    Args:
        array: the pixels from y.min() to y.max() and from x.min() to x.max().
        y: the row of the slide that each row of the result shows.
        x: the same of columns.
    """
    for axis, shown in enumerate((y, x)):
        if np.any(np.diff(shown) != 1):  # else there is no mirror image, and nothing is copied
            array = array.take(shown - shown.min(), axis)
    return array


# ---- squares ------------------------------------------------------------------------------------


def _in_squares(mask: np.ndarray, shape: tuple[int, int], stride: int, side: int) -> np.ndarray:
    """Returns which squares have a pixel of `mask`, bool [rows, columns].

    Args:
        mask: bool [H, W]; the first square lies in its corner.
        shape: rows and columns of squares.
        stride: pixels from one square to the next.
        side: of a square, in pixels.
    """
    for axis, count in enumerate(shape):
        starts = np.arange(count) * stride
        mask = _in_ranges(mask, starts, starts + side, axis)
    return mask


def _in_ranges(mask: np.ndarray, starts: np.ndarray, stops: np.ndarray, axis: int) -> np.ndarray:
    """Returns which ranges along an axis have a True; both ends ascend."""
    kept = mask[: stops[-1]] if axis == 0 else mask[:, : stops[-1]]
    # reduceat takes from each index to the next one, so every second result is a range. The last
    # range reaches to the end.
    edges = np.stack([starts, stops], axis=1).ravel()[:-1]
    found = np.logical_or.reduceat(kept, edges, axis)
    return found.take(np.arange(0, len(edges), 2), axis)


# ---- scale --------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """The pixels of a level that are resampled, along one axis.

    Attributes:
        read: those that are read.
        missing: how many are wanted before and after those, where the level has none.
        box: where the result begins and ends, from the first pixel that is wanted.
        first: for each pixel of the result, the first pixel that it depends on, from the same.
        last: the one after the last.
    """

    read: range
    missing: tuple[int, int]
    box: tuple[float, float]
    first: np.ndarray
    last: np.ndarray


def _span(found: range, ratio: float, length: int) -> _Span:
    """Returns what to read for some rows or columns at the network's scale.

    Args:
        found: these rows or columns.
        ratio: pixels of the level for each of them.
        length: of the level.
    """
    reach = _BICUBIC * ratio
    start = math.floor(found.start * ratio - reach)
    stop = math.ceil(found.stop * ratio + reach)
    read = range(max(start, 0), min(stop, length))
    centers = (np.arange(found.start, found.stop) + 0.5) * ratio - start
    return _Span(
        read,
        (read.start - start, stop - read.stop),
        (found.start * ratio - start, found.stop * ratio - start),
        np.floor(centers - reach).astype(int),
        np.ceil(centers + reach).astype(int),
    )


def _read_scaled(slide: Slide, grid: Grid, rows: range, columns: range) -> Region:
    """Reads a rectangle, given by its rows and columns at the network's scale.

    A pixel does not depend on the rectangle that it is read with, apart from one grey level.
    """
    if grid.resize == (1.0, 1.0):
        return slide.read(grid.level, columns.start, rows.start, len(columns), len(rows))
    level = slide.levels[grid.level]
    x, y = _span(columns, grid.resize[0], level.width), _span(rows, grid.resize[1], level.height)
    region = slide.read(grid.level, x.read.start, y.read.start, len(x.read), len(y.read))
    # Pillow would cut its filter at the end of what is read, so repeat the slide's edge there.
    pixels = _padded(region.pixels, y.missing, x.missing)
    resized = _resized(pixels, (len(columns), len(rows)), x.box, y.box)
    failed = region.failed
    if failed is not None:
        failed = _padded(failed, y.missing, x.missing)
        failed = _in_ranges(_in_ranges(failed, y.first, y.last, 0), x.first, x.last, 1)
    return Region(resized, failed)


def _resized(
    pixels: np.ndarray, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float]
) -> np.ndarray:
    """Returns a box of `pixels` in another size, uint8, by Pillow's bicubic filter.

    Args:
        pixels: uint8 [H, W, 3].
        size: width and height of the result.
        x: where the box begins and ends.
        y: the same.
    """
    # One axis after the other, because Pillow rounds in between, and lets the shape of a picture
    # decide which axis is first.
    height = pixels.shape[0]
    image = Image.fromarray(pixels)
    image = image.resize((size[0], height), Image.Resampling.BICUBIC, (x[0], 0, x[1], height))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, (0, y[0], size[0], y[1])))


def _padded(array: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """Returns `array` [H, W, ...] with its first and last rows and columns repeated."""
    if not any(rows + columns):
        return array
    return np.pad(array, (rows, columns, (0, 0))[: array.ndim], "edge")
