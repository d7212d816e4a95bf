"""Scores the windows of a slide, one row of blocks at a time."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.scoring.scorer import batch_size, check_finite, two_sizes
from bef_jax.slides.blocks import ReadBlock, read_blocks
from bef_jax.slides.reader import Slide
from bef_jax.slides.tiles import Block, Grid

# Takes tiles, uint8 [S, S, 3] each, and yields probabilities by batches, [n] or [n, K].
Predict = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Windows:
    """Windows of a slide that have tissue, and what the network says about them.

    Attributes:
        rows: int32 [N], rows of the grid, ascending.
        columns: int32 [N], columns of the grid, ascending within a row.
        probabilities: float64 [N] of class 1, or [N, K]; NaN where a tile cannot be decoded.
    """

    rows: np.ndarray
    columns: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Network:
    """A trained network that scores the windows of slides.

    Attributes:
        digest: of its weights.
        engine: that computes the scores, such as "jax float32".
        predict: as `for_slides` returns it.
    """

    digest: str
    engine: str
    predict: Predict


def for_slides(predict: Callable[..., Iterator], config: ConfigDict, mesh: Mesh) -> Predict:
    """Returns a predictor of `scorer.make_predictor` that compiles two programs for all slides."""
    return functools.partial(predict, sizes=two_sizes(batch_size(config, mesh), mesh))


def score_row(
    predict: Predict,
    slide: Slide,
    grid: Grid,
    blocks: list[Block],
    classes: int = 2,
    wait: Callable[[float], object] = lambda seconds: None,
) -> Windows:
    """Reads and scores one row of blocks; see `score_rows`."""
    (windows,) = score_rows(predict, slide, grid, [blocks], classes, wait)
    return windows


def score_rows(
    predict: Predict,
    slide: Slide,
    grid: Grid,
    rows: Iterable[list[Block]],
    classes: int = 2,
    wait: Callable[[float], object] = lambda seconds: None,
) -> Iterator[Windows]:
    """Yields the scored windows of rows of blocks, and reads the next row while it scores one.

    Batches never cross rows of blocks. So a run that goes on with the next row computes the same
    batches, and the same bits, as a run that was never stopped.

    Args:
        predict: of `for_slides`.
        slide: that the grid belongs to.
        grid: of its windows.
        rows: of blocks, such as those of `block_rows` that are not scored yet.
        classes: number of classes of the network.
        wait: see `read_blocks`.

    Raises:
        UserError: the slide can no longer be opened.
        RunError: the network's scores are not finite.
    """
    rows = list(rows)
    reads = read_blocks(slide, grid, (block for row in rows for block in row), wait)
    with contextlib.closing(reads):
        for row in rows:
            yield _score(predict, itertools.islice(reads, len(row)), slide, grid, classes)


def _score(
    predict: Predict, reads: Iterable[ReadBlock], slide: Slide, grid: Grid, classes: int
) -> Windows:
    good: list[np.ndarray] = []
    failed: list[np.ndarray] = []

    def tiles() -> Iterator[np.ndarray]:
        for read in reads:
            places = _places(read, read.tissue & ~read.failed)
            good.append(places)
            failed.append(_places(read, read.failed))
            # Views of the block: the only copy of a tile is the one in its batch.
            yield from (read.tile(row, column, grid) for row, column in places.tolist())

    found = list(predict(tiles()))
    empty = np.empty((0, *(() if classes == 2 else (classes,))))
    places, probabilities = np.concatenate(good), np.concatenate([empty, *found])
    _check_finite(probabilities, places, slide, grid)
    places = np.concatenate([places, *failed])
    missing = np.full((len(places) - len(probabilities), *empty.shape[1:]), np.nan)
    probabilities = np.concatenate([probabilities, missing])
    order = np.lexsort(places.T[::-1])
    return Windows(*places[order].T, probabilities[order])


def _places(read: ReadBlock, which: np.ndarray) -> np.ndarray:
    """Returns rows and columns of the grid, int32 [N, 2], of some windows of a block."""
    first = read.block.rows.start, read.block.columns.start
    return (np.argwhere(which) + first).astype(np.int32)


def _check_finite(probabilities: np.ndarray, places: np.ndarray, slide: Slide, grid: Grid) -> None:
    """Raises `RunError` if a window that was read has no finite score, and names the first."""
    bad = np.isnan(probabilities).any(axis=tuple(range(1, probabilities.ndim)))
    for row, column in places[bad][:1]:
        x, y = grid.corners(row, column)
        check_finite(probabilities[bad][:1], [f"{slide.path}:x={x:.0f}:y={y:.0f}"])
