"""Draws the patches of a split: first a slide, then a window of it.

What is drawn depends on config.data.seed and the slides' names, and not on the order of files or
on the number of threads.
"""

import csv
import hashlib
import io
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.chunk import CHUNK_SIZE, Begin, Chunk, counted
from bef_jax.data.sources.slides.survey import Survey
from bef_jax.runtime.devices import cores
from bef_jax.slides.blocks import ReadBlock, read_block
from bef_jax.slides.reader import Slide, open_slide
from bef_jax.slides.tiles import Block, Grid

LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 64 << 20  # the most bytes of a chunk's pixels
_FEWEST_READ = 8  # windows that are read at once


class Patch(NamedTuple):
    """A patch that was drawn.

    Attributes:
        image: uint8 [S, S, 3].
        label: 1 if the square in its middle has tumour, else 0.
        id: name of the slide, and the place of the square.
        group: see `Found`.
    """

    image: np.ndarray
    label: int
    id: str
    group: str


@dataclass
class Draw:
    """How far the drawing of one class is in one slide.

    Attributes:
        survey: the slide.
        label: number of the class.
        capacity: number of its windows that may be drawn, as far as is known.
        next: place in their order from which windows were not looked at yet.
        taken: patches that were drawn.
        glass: windows that were left out because they have no tissue.
        failed: windows that were left out because they cannot be decoded.
    """

    survey: Survey
    label: int
    capacity: int = field(init=False)
    next: int = 0
    taken: int = 0
    glass: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        self.capacity = self.survey.counts[self.label]


class Drawing:
    """The patches of all splits, while they are drawn."""

    def __init__(
        self,
        data: ConfigDict,
        splits: Mapping[str, Sequence[Survey]],
        quotas: Mapping[str, tuple[int, int]],
    ) -> None:
        """Takes config.data, the slides of each split, and how many patches of a class it draws."""
        self._data, self._quotas = data, quotas
        # A chunk and the windows that are read ahead for it are in memory at once.
        self._chunk = min(CHUNK_SIZE, max(1, _CHUNK_BYTES // (3 * data.patch_size**2)))
        self._draws = {
            split: [
                [Draw(each, label) for each in sorted(surveys, key=self._place)]
                for label in range(2)
            ]
            for split, surveys in splits.items()
        }

    def _place(self, survey: Survey) -> bytes:
        """Returns what orders the slides, so that their names do not."""
        return _digest(self._data.seed, survey.found.name)

    def chunks(self, begin: Begin) -> Iterator[tuple[str, Chunk]]:
        """Yields (split, chunk) of all patches; several threads read them."""
        with ThreadPoolExecutor(cores()) as pool:
            for split, draws in self._draws.items():
                wanted = [
                    _reachable(*each) for each in zip(draws, self._quotas[split], strict=True)
                ]
                streams = [
                    self._patches(pool, each, count)
                    for each, count in zip(draws, wanted, strict=True)
                ]
                chunks = _stacked(_merged(streams, wanted), self._chunk)
                yield from counted(split, chunks, sum(wanted), begin)
                _report(split, draws, self._quotas[split])

    def _patches(
        self, pool: ThreadPoolExecutor, draws: Sequence[Draw], wanted: int
    ) -> Iterator[Patch]:
        """Yields the patches of one class, slide by slide.

        Each slide gives equally many. What one lacks is drawn from the others in another round.
        """
        while True:
            shares = even_shares(wanted, [each.capacity for each in draws])
            missing = [(draw, n - draw.taken) for draw, n in zip(draws, shares, strict=True)]
            if not any(count for _, count in missing):
                return
            for draw, count in missing:
                if count:
                    yield from self._of_slide(pool, draw, count)

    def _of_slide(self, pool: ThreadPoolExecutor, draw: Draw, count: int) -> Iterator[Patch]:
        """Yields so many more patches of a slide, or fewer if it runs out of them."""
        found = draw.survey.found
        order = window_order(draw.survey, draw.label, self._data.seed)
        with open_slide(found.path, self._data.slide_mpp or None) as slide:
            while count and draw.next < len(order):
                size = min(max(count, _FEWEST_READ), self._chunk)
                windows = order[draw.next : draw.next + size]
                for window, read in zip(
                    windows, _read(pool, slide, draw.survey.grid, windows), strict=True
                ):
                    draw.next += 1
                    if patch := _patch(draw, window, read):
                        yield patch
                        count -= 1
                    if not count:
                        break
        if draw.next == len(order):
            draw.capacity = draw.taken

    def tables(self) -> dict[str, str]:
        """Returns the files that describe the drawing, by name: slides.csv, a row for a slide."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(_COLUMNS)
        rows.writerows(
            _row(split, normal, tumour)
            for split, (normals, tumours) in self._draws.items()
            for normal, tumour in sorted(
                zip(normals, tumours, strict=True), key=lambda pair: pair[0].survey.found.name
            )
        )
        return {"slides.csv": text.getvalue()}


# ---- which windows ------------------------------------------------------------------------------


def even_shares(wanted: int, capacities: Sequence[int]) -> list[int]:
    """Returns how much each gives of what is wanted: equally much, as far as each can.

    The first ones give one more if it does not divide evenly.
    """
    limits = np.asarray(capacities)
    shares = np.zeros_like(limits)
    while (left := wanted - shares.sum()) and (free := np.flatnonzero(shares < limits)).size:
        free = free[:left]
        shares[free] = np.minimum(shares[free] + left // len(free), limits[free])
    return shares.tolist()


def window_order(survey: Survey, label: int, seed: int) -> np.ndarray:
    """Returns the numbers of a slide's windows of a class, in the order of drawing, int64 [N]."""
    digest = _digest(seed, survey.found.name, label)
    return np.random.default_rng(list(digest)).permutation(survey.windows(label))


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _reachable(draws: Sequence[Draw], quota: int) -> int:
    """Returns how many patches of a class can be drawn, if all of its windows are tissue."""
    return min(quota, sum(each.capacity for each in draws))


# ---- pixels -------------------------------------------------------------------------------------


def _read(
    pool: ThreadPoolExecutor, slide: Slide, grid: Grid, windows: np.ndarray
) -> list[ReadBlock]:
    """Returns the windows as blocks of one, in their order."""

    def one(window: int) -> ReadBlock:
        row, column = divmod(int(window), grid.columns)
        return read_block(slide, grid, Block(range(row, row + 1), range(column, column + 1)))

    # Read in the order of places, because neighbours lie in the same tiles of the file.
    places = np.argsort(windows)
    blocks: list[ReadBlock | None] = [None] * len(windows)
    for place, block in zip(places, pool.map(one, windows[places]), strict=True):
        blocks[place] = block
    return blocks


def _patch(draw: Draw, window: int, read: ReadBlock) -> Patch | None:
    """Returns a window as a patch; None, and counts it, if it is glass or cannot be decoded."""
    if read.failed[0, 0]:
        draw.failed += 1
        return None
    if not read.tissue[0, 0]:
        draw.glass += 1
        return None
    draw.taken += 1
    grid, found = draw.survey.grid, draw.survey.found
    row, column = divmod(int(window), grid.columns)
    x, y = grid.corners(np.array([row]), np.array([column]))
    name = f"{found.name}:x={round(x[0])}:y={round(y[0])}"
    return Patch(read.tile(row, column, grid), draw.label, name, found.group)


def _merged(streams: Sequence[Iterator[Patch]], wanted: Sequence[int]) -> Iterator[Patch]:
    """Yields the patches of all classes, so that each part of them has all classes."""
    left = dict(enumerate(streams))
    given = [0] * len(streams)
    while left:
        label = min(left, key=lambda i: (given[i] + 0.5) / max(wanted[i], 1))
        if patch := next(left[label], None):
            given[label] += 1
            yield patch
        else:
            del left[label]


def _stacked(patches: Iterator[Patch], size: int) -> Iterator[Chunk]:
    while batch := list(itertools.islice(patches, size)):
        images, labels, ids, groups = zip(*batch, strict=True)
        yield Chunk(
            np.stack(images), np.asarray(labels, np.uint8), np.asarray(ids), np.asarray(groups)
        )


# ---- what is said of them -----------------------------------------------------------------------

_COLUMNS = (
    *("name", "split", "file", "annotation", "width", "height", "mpp", "level"),
    *("normal_windows", "tumour_windows", "normal_patches", "tumour_patches", "glass", "failed"),
)


def _row(split: str, normal: Draw, tumour: Draw) -> tuple:
    survey = normal.survey
    found = survey.found
    annotation = found.annotation.name if found.annotation else ""
    facts = (found.name, split, found.path.name, annotation, *survey.size, f"{survey.mpp:.6g}")
    left_out = (normal.glass + tumour.glass, normal.failed + tumour.failed)
    return (*facts, survey.grid.level, *survey.counts, normal.taken, tumour.taken, *left_out)


def _report(split: str, draws: Sequence[Sequence[Draw]], quota: Sequence[int]) -> None:
    for found, wanted, kind in zip(draws, quota, ("without", "with"), strict=True):
        taken = [each.taken for each in found if each.taken]
        glass, failed = sum(each.glass for each in found), sum(each.failed for each in found)
        LOG.info(
            "%s: %d patches %s tumour from %d slides; left out %d windows of glass, and %d that "
            "cannot be decoded",
            split, sum(taken), kind, len(taken), glass, failed,
        )  # fmt: skip
        if sum(taken) < wanted:
            LOG.warning(
                "%s: the slides have %d patches %s tumour, and not %d; config.data.sampling="
                "balanced draws both classes equally often",
                split, sum(taken), kind, wanted,
            )  # fmt: skip
