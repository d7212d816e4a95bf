"""Scores the windows of a slide, one row of blocks at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

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


def score_row(
    predict: Predict, slide: Slide, grid: Grid, blocks: list[Block], classes: int = 2
) -> Windows:
    """Reads and scores one row of blocks.

    Batches never cross rows of blocks. So a run that goes on with the next row computes the same
    batches, and the same bits, as a run that was never stopped.

    Raises:
        UserError: the slide can no longer be opened.
        RunError: the network's scores are not finite.
    """
    places: list[np.ndarray] = []

    def tiles() -> Iterator[np.ndarray]:
        for read in read_blocks(slide, grid, blocks):
            yield from _tiles_of(read, grid, places)

    found = list(predict(tiles()))
    failed = [place for place in places if place[2]]
    good = [place for place in places if not place[2]]
    shape = () if classes == 2 else (classes,)
    probabilities = np.concatenate([*found, np.full((len(failed), *shape), np.nan)])
    rows, columns = (np.array([p[i] for p in good + failed], np.int32) for i in (0, 1))
    order = np.lexsort((columns, rows))
    return Windows(rows[order], columns[order], probabilities[order])


def _tiles_of(read: ReadBlock, grid: Grid, places: list) -> Iterator[np.ndarray]:
    for row, column in np.argwhere(read.tissue):
        is_failed = bool(read.failed[row, column])
        place = read.block.rows.start + row, read.block.columns.start + column
        places.append((*place, is_failed))
        if not is_failed:
            yield read.tile(*place, grid)
