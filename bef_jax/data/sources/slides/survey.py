"""Looks at each slide before patches are drawn: its scale, and which of its windows have tumour."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.chunk import Begin, silent
from bef_jax.data.patch import Tiling
from bef_jax.data.sources.slides.finding import Found
from bef_jax.errors import UserError, listed, printable
from bef_jax.runtime.devices import cores
from bef_jax.slides.annotations import Annotation, read_annotation
from bef_jax.slides.reader import Slide, open_slide
from bef_jax.slides.tiles import Grid, make_grid

LOG = logging.getLogger(__name__)
_BAND = 1 << 22  # pixels of an annotation that are in memory at once, for each thread


@dataclass(frozen=True)
class Survey:
    """What is known of a slide before its pixels are read.

    Attributes:
        found: its file, name and annotation.
        grid: its windows, at the network's scale.
        size: width and height in pixels of level 0.
        mpp: micrometres per pixel of level 0.
        tumour: which windows have tumour, as bits in the order of the grid; None if none has.
        counts: number of windows without and with tumour.
    """

    found: Found
    grid: Grid
    size: tuple[int, int]
    mpp: float
    tumour: np.ndarray | None
    counts: tuple[int, int]

    def windows(self, label: int) -> np.ndarray:
        """Returns the numbers of the windows of a class, row by row of the grid, int64 [N]."""
        count = sum(self.counts)
        if self.tumour is None:
            return np.arange(count if label == 0 else 0)
        return np.flatnonzero(np.unpackbits(self.tumour, count=count) == label)


def survey_all(
    found: Sequence[Found], data: ConfigDict, mpp: float, begin: Begin = silent
) -> list[Survey]:
    """Returns what is known of each slide; several threads read the annotations.

    Args:
        found: the slides.
        data: config.data.
        mpp: micrometres per pixel of the patches.
        begin: see `sources.open_source`.

    Raises:
        UserError: a slide cannot be opened, does not say its scale or is too coarse, an annotation
            is refused or contradicts reference.csv, or one class is in no slide.
    """
    center = data.slide_center or data.patch_size
    tiling = Tiling(data.patch_size, center, center)
    advance = begin("reading annotations", len(found), "slides")

    def one(each: Found) -> Survey:
        with open_slide(each.path, data.slide_mpp or None) as slide:
            return survey(each, slide, make_grid(slide, tiling, mpp))

    surveys = []
    with ThreadPoolExecutor(cores()) as pool:
        for each in pool.map(one, found):
            surveys.append(each)
            advance(1)
    surveys = _known(surveys)
    _check(surveys, data)
    return surveys


def survey(found: Found, slide: Slide, grid: Grid) -> Survey:
    """Returns what is known of an open slide.

    Raises:
        UserError: its annotation is refused.
    """
    size, count, tumour = slide.levels[0][:2], grid.rows * grid.columns, None
    positive = 0
    if found.annotation:
        windows = tumour_windows(read_annotation(found.annotation, size), grid)
        positive = int(np.count_nonzero(windows))
        tumour = np.packbits(windows) if positive else None
    return Survey(found, grid, size, slide.mpp, tumour, (count - positive, positive))


def tumour_windows(annotation: Annotation, grid: Grid) -> np.ndarray:
    """Returns which windows have a pixel of tumour, bool [rows, columns].

    Only pixels inside the slide count. The windows lie side by side.
    """
    side = grid.tiling.center
    found = np.empty((grid.rows, grid.columns), bool)
    step = max(1, _BAND // (side * grid.width))
    for top in range(0, grid.rows, step):
        first, last = top * side, min((top + step) * side, grid.height)
        shape = (last - first, grid.width)
        area = annotation.area(0.0, first * grid.scale[1], grid.scale, shape)
        rows = np.logical_or.reduceat(area, np.arange(0, shape[0], side), axis=0)
        found[top : top + step] = np.logical_or.reduceat(
            rows, np.arange(0, grid.width, side), axis=1
        )
    return found


def _known(surveys: Sequence[Survey]) -> list[Survey]:
    """Returns the slides without those that have tumour which no annotation shows.

    Raises:
        UserError: an annotation has tumour, but reference.csv calls the slide normal.
    """
    for each in surveys:
        if each.counts[1] and each.found.is_tumour is False:
            raise UserError(
                f"{each.found.annotation}: has tumour, but reference.csv calls {each.found.name} "
                "normal; correct one of them"
            )
    hidden = [each.found.name for each in surveys if each.found.is_tumour and not each.counts[1]]
    if hidden:
        text = "%d slides with tumour are left out, because no annotation shows where: %s"
        LOG.warning(text, len(hidden), printable(listed(hidden)))
    return [each for each in surveys if each.counts[1] or not each.found.is_tumour]


def _check(surveys: Sequence[Survey], data: ConfigDict) -> None:
    """Reports the slides that count as normal; raises UserError if a class is in no slide."""
    names = [each.found.name for each in surveys if not each.found.annotation]
    if names:
        # A misnamed annotation would make normal tissue of tumour.
        text = "%d of %d slides have no annotation and count as normal: %s"
        LOG.info(text, len(names), len(surveys), printable(listed(names)))
    if not any(each.counts[1] for each in surveys):
        raise UserError(
            f"{data.annotations or data.dir}: no slide has an annotation with tumour; set "
            "config.data.annotations to the folder of the annotations"
        )
    if not any(each.counts[0] for each in surveys):
        raise UserError(
            f"{data.dir}: each window has tumour, so that none is normal; add normal slides"
        )
