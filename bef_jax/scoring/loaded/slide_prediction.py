"""What a loaded network says about a whole slide."""

import dataclasses
import os

import numpy as np

from bef_jax.data.patch import Tiling
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path
from bef_jax.scoring.slide_scorer import Predict, Windows, score_rows
from bef_jax.slides.reader import Slide, open_slide
from bef_jax.slides.tiles import Grid, block_rows, make_grid


@dataclasses.dataclass(frozen=True)
class SlidePrediction:
    """The windows of a slide that have tissue, and their probabilities.

    A window is the square that one patch decides, such as the middle 32 px of 96. All places are in
    pixels of the slide's largest level, level 0.

    Attributes:
        x: left edges of the windows, float64 [N]; N is 0 for a slide without tissue.
        y: their upper edges, float64 [N].
        side: of a window.
        probabilities: float64 [N] of class 1, or [N, K] for K > 2 classes; NaN where a patch cannot
            be decoded.
        step: from one window to the next, in x and y.
        shape: rows and columns of windows of the whole slide, and of a map.
        width: of the slide.
        height: of the slide.
        mpp: micrometres per pixel of level 0.
    """

    x: np.ndarray
    y: np.ndarray
    side: float
    probabilities: np.ndarray
    step: tuple[float, float]
    shape: tuple[int, int]
    width: int
    height: int
    mpp: float

    def to_map(self) -> np.ndarray:
        """Returns the probabilities as a picture, float32 [rows, columns] or [K, rows, columns].

        Pixel (row, column) is the window whose upper left corner is at x = column * step[0] and
        y = row * step[1]. It is NaN where there is no tissue, or the patch cannot be decoded.
        """
        rows, columns = (
            np.rint(places / step).astype(int)
            for places, step in ((self.y, self.step[1]), (self.x, self.step[0]))
        )
        drawn = np.full((*self.probabilities.shape[1:], *self.shape), np.nan, np.float32)
        drawn[..., rows, columns] = self.probabilities.T
        return drawn


def predict_slide(
    where: str | os.PathLike,
    predict: Predict,
    tiling: Tiling,
    network_mpp: float,
    classes: int,
    mpp: float | None,
) -> SlidePrediction:
    """Returns what `predict` says about a slide.

    Args:
        where: path of the slide.
        predict: takes patches of `tiling.side`, as `slide_scorer.for_slides` returns it.
        tiling: sides and stride of the windows.
        network_mpp: micrometres per pixel of the network's patches.
        classes: number of its classes.
        mpp: micrometres per pixel of level 0; None: as the slide says.

    Raises:
        UserError: the slide cannot be read, or its scale does not fit or is not known.
        RunError: the scores of a patch are not finite.
    """
    path = user_path(where)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if mpp is not None and not 0 < mpp < np.inf:
        raise UserError(f"mpp={mpp!r}: give micrometres per pixel, such as 0.25")
    with open_slide(path, mpp) as slide:
        if not slide.mpp:
            raise UserError(f"{path}: does not say its um per pixel; give predict_slide(..., mpp=)")
        grid = make_grid(slide, tiling, network_mpp)
        rows = list(score_rows(predict, slide, grid, block_rows(grid), classes))
        return _joined(rows, slide, grid)


def _joined(rows: list[Windows], slide: Slide, grid: Grid) -> SlidePrediction:
    names = ("rows", "columns", "probabilities")
    found = Windows(*(np.concatenate([getattr(row, name) for row in rows]) for name in names))
    x, y = grid.corners(found.rows, found.columns)
    stride, width, height = grid.tiling.stride, *slide.levels[0][:2]
    step = stride * grid.scale[0], stride * grid.scale[1]
    shape = grid.rows, grid.columns
    return SlidePrediction(
        x, y, grid.side, found.probabilities, step, shape, width, height, slide.mpp
    )


def checked_stride(stride: int | None, default: int) -> int:
    """Returns the stride between windows, in pixels at the network's scale.

    Raises:
        UserError: it is not a whole number of pixels, or below 1.
    """
    if stride is None:
        return default
    if isinstance(stride, bool) or not isinstance(stride, int | np.integer) or stride < 1:
        raise UserError(f"stride={stride!r}: give a whole number of pixels, 1 or more")
    return int(stride)
