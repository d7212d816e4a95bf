"""Lesions of a slide by the rules of CAMELYON16.

Ehteshami Bejnordi et al., JAMA 2017, and evaluation_FROC.py, the script of the challenge.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from bef_jax.slides.annotations import Annotation

MASK_MPP = 7.776  # um per pixel of the challenge's masks: level 5 of 0.243 um
_WIDENED = 75.0  # um, five tumour cells: nearer parts of tumour are one lesion
_LONGEST_ITC = 275.0  # um; lesions below it are isolated tumour cells (ITC)
_BAND = 512  # rows of the mask that are read at once
_NEIGHBOURS = np.ones((3, 3), bool)  # corners count, too


@dataclass(frozen=True)
class Lesions:
    """The lesions of a slide, numbered from 1.

    Attributes:
        labels: int32 [H, W], the number of the lesion in each pixel of the mask; 0: none. It is
            cut to what has lesions.
        corner: row and column of its first pixel in the mask of the whole slide.
        downsample: pixels of level 0 for each of the mask.
        centres: float64 [N, 2], x and y of the lesions' centroids, in pixels of level 0.
        longest_axes: float64 [N], in micrometres.
        is_itc: bool [N].
    """

    labels: np.ndarray
    corner: tuple[int, int]
    downsample: int
    centres: np.ndarray
    longest_axes: np.ndarray
    is_itc: np.ndarray

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Returns the number of the lesion at points, in pixels of level 0; 0 if there is none."""
        rows, columns = (
            np.floor(places / self.downsample).astype(int) - first
            for places, first in zip((y, x), self.corner, strict=True)
        )
        height, width = self.labels.shape
        is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        found = np.zeros(len(rows), int)
        found[is_inside] = self.labels[rows[is_inside], columns[is_inside]]
        return found


def downsample_of(mpp: float) -> int:
    """Returns the power of two that brings a slide of `mpp` um per pixel nearest to 7.776 um."""
    return 2 ** max(0, round(math.log2(MASK_MPP / mpp)))


def find_lesions(annotation: Annotation | None, size: tuple[int, int], mpp: float) -> Lesions:
    """Returns the lesions of a slide.

    Tumour is widened by half of 75 um, holes are filled, and connected parts are one lesion.

    Args:
        annotation: None if there is no tumour.
        size: the slide's width and height, in pixels of level 0.
        mpp: micrometres per pixel of level 0.

    Raises:
        UserError: the annotation can no longer be read.
    """
    factor = downsample_of(mpp)
    truth = np.zeros((0, 0), bool) if annotation is None else _sample(annotation, size, factor)
    labels, corner = label_lesions(truth, mpp * factor)
    centres, axes = _measure(labels)
    axes *= mpp * factor
    centres = (centres + np.array(corner[::-1]) + 0.5) * factor
    return Lesions(labels, corner, factor, centres, axes, axes < _LONGEST_ITC)


def _sample(annotation: Annotation, size: tuple[int, int], factor: int) -> np.ndarray:
    """Returns the annotation as a mask of the slide, bool [H, W]."""
    width, height = (math.ceil(length / factor) for length in size)
    bands = [
        annotation.area(0, top * factor, (factor, factor), (min(_BAND, height - top), width))
        for top in range(0, height, _BAND)
    ]
    return np.concatenate(bands)


def label_lesions(truth: np.ndarray, mpp: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the challenge's evaluation mask, cut to what has lesions, and where it begins.

    Args:
        truth: bool [H, W].
        mpp: micrometres per pixel of it.

    Returns:
        labels: int32 [h, w].
        corner: row and column of its first pixel.
    """
    if not truth.any():
        return np.zeros((0, 0), np.int32), (0, 0)
    radius = _WIDENED / (mpp * 2)
    # The margin has background all around, except at the mask's own edges. So holes are the same
    # as in the whole mask.
    window = _around(truth, math.ceil(radius) + 1)
    widened = ndimage.distance_transform_edt(~truth[window]) < radius
    labels, _ = ndimage.label(ndimage.binary_fill_holes(widened), _NEIGHBOURS)
    return labels.astype(np.int32), (window[0].start, window[1].start)


def _around(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Returns where the pixels of a mask lie, with a margin inside of it."""
    places = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    rows, columns = (slice(max(0, found[0] - margin), found[-1] + 1 + margin) for found in places)
    return rows, columns


def _measure(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns centroids [N, 2], column and row, and the longest axes [N], in pixels.

    The axis is that of the ellipse with the same second moments, as scikit-image has it:
    4 sqrt(the largest eigenvalue of the covariance of the pixels' places).
    """
    rows, columns = np.nonzero(labels)
    which = labels[rows, columns] - 1
    count = np.bincount(which)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(which, values) / count

    x, y = mean(columns), mean(rows)
    dx, dy = columns - x[which], rows - y[which]
    xx, yy, xy = mean(dx * dx), mean(dy * dy), mean(dx * dy)
    largest = (xx + yy) / 2 + np.hypot((xx - yy) / 2, xy)
    return np.stack([x, y], axis=1), 4 * np.sqrt(largest)
