"""What was decided about the windows of a slide, as arrays with a cell for each window.

The cells lie side by side and cover the slide: each place belongs to the window whose middle is
nearest. At a stride equal to a window's side, a cell is the window itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bef_jax.scoring.slide_scorer import Windows
from bef_jax.slides.reader import Slide
from bef_jax.slides.tiles import Grid

_FAILED = -2  # in the place of a class
_STEP = 0.01  # pixels of level 0 to which borders are rounded, where they are not whole


@dataclass(frozen=True)
class WindowMap:
    """The windows of a slide; all arrays are [rows, columns] of the grid.

    Attributes:
        grid: where the windows lie.
        size: width and height of the slide, in pixels of level 0.
        mpp: micrometres per pixel of level 0.
        probability: float64, of class 1; of more than two classes, the greatest one. NaN where
            nothing was decided.
        called: int16, the number of the class that a window is called; -1 where there is no
            window, and -2 where a window could not be decoded.
    """

    grid: Grid
    size: tuple[int, int]
    mpp: float
    probability: np.ndarray
    called: np.ndarray

    @property
    def tissue(self) -> np.ndarray:
        """Returns the windows that have tissue and were decided, bool [rows, columns]."""
        return self.called >= 0

    @property
    def failed(self) -> np.ndarray:
        """Returns the windows that could not be decoded, bool [rows, columns]."""
        return self.called == _FAILED

    @property
    def pitch(self) -> tuple[float, float]:
        """Returns the width and height of a cell, in pixels of level 0."""
        stride, (x, y) = self.grid.tiling.stride, self.grid.scale
        return stride * x, stride * y

    @property
    def origin(self) -> tuple[float, float]:
        """Returns x and y of the first cell's corner, in pixels of level 0.

        It is not (0, 0) if the stride is not the side of a window, because a cell and its window
        have the same middle.
        """
        offset = (self.grid.tiling.center - self.grid.tiling.stride) / 2
        return offset * self.grid.scale[0], offset * self.grid.scale[1]

    def borders(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns x, float64 [columns + 1], and y, [rows + 1], of the borders between cells.

        They are in pixels of level 0, have two decimals at most, and ascend from 0 to the slide's
        width or height. So the outer cells reach to the edge of the slide, and end there.
        """
        counts = self.grid.columns, self.grid.rows
        return tuple(map(_borders, counts, self.pitch, self.origin, self.size))


def _borders(count: int, pitch: float, origin: float, length: int) -> np.ndarray:
    inner = np.round(origin + pitch * np.arange(1, count), 2)
    # Rounding could move the last border to the edge, so that the last cell would be empty.
    return np.concatenate([[0.0], np.minimum(inner, length - _STEP), [float(length)]])


def gather(slide: Slide, grid: Grid, windows: Iterable[Windows], threshold: float) -> WindowMap:
    """Returns the map of a slide's windows.

    Args:
        windows: any parts of the slide, each at most once.
        threshold: of two classes, class 1 is called where its probability is not below this.
    """
    shape = grid.rows, grid.columns
    probability, called = np.full(shape, np.nan), np.full(shape, -1, np.int16)
    for part in windows:
        numbers, greatest = _decide(part.probabilities, threshold)
        places = part.rows, part.columns
        probability[places], called[places] = greatest, numbers
    return WindowMap(grid, tuple(slide.levels[0][:2]), slide.mpp, probability, called)


def _decide(probabilities: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns which class each window is called, int [N], and a probability, [N].

    Args:
        probabilities: [N] of class 1, or [N, K]; NaN where a tile cannot be decoded.
        threshold: of two classes.

    Returns:
        The class, -2 where the probability is NaN; and the probability of class 1, or for K > 2
        that of the class.
    """
    if probabilities.ndim == 1:
        greatest, numbers = probabilities, probabilities >= threshold
    else:
        greatest, numbers = probabilities.max(axis=1), probabilities.argmax(axis=1)
    return np.where(np.isnan(greatest), _FAILED, numbers), greatest
