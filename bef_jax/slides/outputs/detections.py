"""detections.csv: one point for each candidate lesion, by greedy non-maximum suppression."""

from pathlib import Path

import numpy as np

from bef_jax.runtime import files
from bef_jax.slides.outputs.window_map import WindowMap

_ROUND = 1 << 18  # windows that are sorted at a time, so that sorting takes little memory


def detect(
    probability: np.ndarray, threshold: float, radius: float, pitch: tuple[float, float]
) -> np.ndarray:
    """Returns the windows that stand for candidate lesions, int [N, 2], greatest first.

    Takes the window with the greatest probability, removes all windows whose distance from it is
    at most `radius`, and again, as Liu et al. (2017) do. Of equal windows the first in row-major
    order is taken.

    Args:
        probability: float64 [rows, columns]; NaN where nothing was decided.
        threshold: the smallest probability of a candidate.
        radius: in micrometres.
        pitch: micrometres between neighbouring windows, in x and y.
    """
    disc = _disc(radius, pitch, probability.shape)
    left = probability >= threshold
    flat, found = left.reshape(-1), []
    while left.any():
        values = probability[left]
        if len(values) > _ROUND:
            # All that are not below the cut, so that equal windows are sorted together.
            values.partition(-_ROUND)
            places = np.flatnonzero(left & (probability >= values[-_ROUND]))
        else:
            places = np.flatnonzero(flat)
        values = probability.reshape(-1)[places]
        for place in places[np.argsort(-values, kind="stable")].tolist():
            if flat[place]:
                found.append(place)
                _remove(left, place, disc)
    return np.stack(np.unravel_index(np.array(found, int), probability.shape), axis=1)


def _disc(radius: float, pitch: tuple[float, float], shape: tuple[int, int]) -> np.ndarray:
    """Returns which neighbours of a window are near, bool; the window is in the middle."""
    reach = [
        min(int(radius / length), count) for length, count in zip(pitch[::-1], shape, strict=True)
    ]
    y, x = (np.arange(-n, n + 1) * length for n, length in zip(reach, pitch[::-1], strict=True))
    return y[:, None] ** 2 + x**2 <= radius**2


def _remove(left: np.ndarray, place: int, disc: np.ndarray) -> None:
    """Sets the windows around one to False; the disc may reach past the grid."""
    areas = []
    for middle, side, count in zip(
        divmod(place, left.shape[1]), disc.shape, left.shape, strict=True
    ):
        first = middle - side // 2
        start, stop = max(first, 0), min(first + side, count)
        areas.append((slice(start, stop), slice(start - first, stop - first)))
    (rows, disc_rows), (columns, disc_columns) = areas
    left[rows, columns] &= ~disc[disc_rows, disc_columns]


def write_detections(file: Path, found: WindowMap, threshold: float, radius: float) -> int:
    """Writes x, y (the window's middle in whole pixels of level 0) and the probability.

    The greatest comes first. Points lie inside the slide. Returns how many there are.
    """
    pitch = found.pitch[0] * found.mpp, found.pitch[1] * found.mpp
    places = detect(found.probability, threshold, radius, pitch)
    x, y = _middles(places, found)
    values = found.probability[places[:, 0], places[:, 1]]
    lines = [f"{a},{b},{p!r}\n" for a, b, p in zip(x, y, values.tolist(), strict=True)]
    files.write_text(file, "".join(["x,y,probability\n", *lines]))
    return len(lines)


def _middles(places: np.ndarray, found: WindowMap) -> list[list[int]]:
    corners = found.grid.corners(places[:, 0], places[:, 1])
    half = found.grid.tiling.center / 2
    middles = []
    for corner, scale, length in zip(corners, found.grid.scale, found.size, strict=True):
        # The last windows may reach past the slide's edge, and their middles as well.
        inside = np.minimum(np.floor(corner + half * scale), length - 1)
        middles.append(inside.astype(int).tolist())
    return middles
