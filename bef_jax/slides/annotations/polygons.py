"""Polygons around tumour, and around what is to be cut out of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bef_jax.errors import UserError
from bef_jax.slides.annotations.annotation import Annotation

# ASAP says None, and GeoJSON nothing, where no group was chosen. _0, _1 and Tumor are the tumour of
# CAMELYON16, and metastases that of CAMELYON17.
_TUMOUR = ("", "none", "_0", "_1")
_TUMOUR_STARTS = ("tumo", "metasta", "cancer", "carcinoma", "malignan", "lesion", "positive")
# _2 is what CAMELYON16 cuts out, and normal what CAMELYON17 does. QuPath has a class Ignore*.
_EXCLUDED = ("_2",)
_EXCLUDED_STARTS = ("exclu", "ignore", "normal")
_FARTHEST = 1e9  # pixels; no slide is as large, and larger numbers could overflow
_CROSSINGS = 1 << 20  # of edges and rows of pixels that are computed at once: some 50 MB


class Shape(NamedTuple):
    """A polygon, or several that hold the holes of each other.

    Attributes:
        edges: float64 [E, 4], x and y of both ends, in pixels of level 0. No edge is horizontal.
        box: float64 [4], the least x and y, and the greatest ones.
    """

    edges: np.ndarray
    box: np.ndarray


def is_tumour(group: str, where: str) -> bool:
    """Returns whether a group or class of polygons is tumour; if not, it is cut out of tumour.

    Raises:
        UserError: its name says neither; `where` names the file and the polygon.
    """
    name = group.strip().casefold()
    if name in _EXCLUDED or name.startswith(_EXCLUDED_STARTS):
        return False
    if name in _TUMOUR or name.startswith(_TUMOUR_STARTS):
        return True
    raise UserError(
        f"{where} is of {group!r}, which is neither tumour nor excluded: rename it to tumor, or to "
        "exclusion"
    )


def make_shape(rings: Sequence[Sequence[Sequence[float]]], where: str) -> Shape:
    """Returns the shape whose outline and holes are `rings`; each is closed by its first point.

    Args:
        rings: points [N, 2 or more] each; numbers after x and y are left out.
        where: names the file and the polygon in errors.

    Raises:
        UserError: a point is not two finite numbers.
    """
    edges = [np.empty((0, 4))]
    for ring in rings:
        try:
            points = np.array([(point[0], point[1]) for point in ring]).reshape(-1, 2)
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{where} has a point that is not two numbers") from error
        if points.dtype.kind not in "iuf":  # NumPy would turn texts into numbers
            raise UserError(f"{where} has a point that is not two numbers")
        if not (np.abs(points) <= _FARTHEST).all():  # this is also true for NaN
            raise UserError(f"{where} has a point outside of any slide")
        points = points.astype(np.float64)
        edges.append(np.hstack([points, np.roll(points, -1, axis=0)]))
    found = np.vstack(edges)
    found = found[found[:, 1] != found[:, 3]]
    ends = found.reshape(-1, 2) if len(found) else np.full((1, 2), np.nan)
    return Shape(found, np.concatenate([ends.min(axis=0), ends.max(axis=0)]))


class Polygons(Annotation):
    """Tumour is what lies in a shape of tumour and in no excluded one.

    A point lies in a shape if a ray from it crosses the shape's edges an odd number of times. So
    holes need no direction, and where a polygon crosses itself an area can be outside.
    """

    def __init__(self, path: Path, tumour: Sequence[Shape], excluded: Sequence[Shape]) -> None:
        """Takes the shapes, and the file that they are from."""
        self.path = path
        self._tumour, self._excluded = _with_boxes(tumour), _with_boxes(excluded)

    def area(
        self, x: float, y: float, scale: tuple[float, float], shape: tuple[int, int]
    ) -> np.ndarray:
        """Returns which pixels of a rectangle are tumour; see `Annotation.area`."""
        found = np.zeros(shape, bool)
        _fill_all(self._tumour, found, True, (x, y), scale)
        if found.any():
            _fill_all(self._excluded, found, False, (x, y), scale)
        return found


def _with_boxes(shapes: Sequence[Shape]) -> tuple[list[np.ndarray], np.ndarray]:
    drawn = [shape for shape in shapes if len(shape.edges)]
    return [each.edges for each in drawn], np.array([each.box for each in drawn]).reshape(-1, 4)


def _fill_all(
    shapes: tuple[list[np.ndarray], np.ndarray],
    found: np.ndarray,
    value: bool,
    origin: tuple[float, float],
    scale: tuple[float, float],
) -> None:
    """Sets the pixels of `found` that lie in a shape to `value`."""
    all_edges, boxes = shapes
    # Now the centres of pixels are whole numbers.
    boxes = (boxes - np.tile(origin, 2)) / np.tile(scale, 2) - 0.5
    first = np.maximum(np.ceil(boxes[:, :2]), 0)
    stop = np.minimum(np.floor(boxes[:, 2:]) + 1, found.shape[::-1])
    for number in np.flatnonzero((first < stop).all(axis=1)):
        (left, top), (right, bottom) = first[number].astype(int), stop[number].astype(int)
        edges = (all_edges[number] - np.tile(origin, 2)) / np.tile(scale, 2) - 0.5
        edges -= (left, top, left, top)
        found[top:bottom, left:right][_fill(edges, (bottom - top, right - left))] = value


def _fill(edges: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns which pixels lie inside, bool [H, W]; their centres are at whole numbers.

    Each row of pixels is crossed by edges. A crossing turns all pixels at it and to its right from
    outside to inside, or back.
    """
    height, width = shape
    turns = np.zeros(height * (width + 1), np.uint8)
    for row, u in _crossings(edges, height):
        column = np.clip(np.ceil(u), 0, width).astype(int)
        # The sum may overflow, because only its last bit counts. A sum is used, because NumPy's
        # add.at is ten times as fast as its bitwise_xor.at.
        np.add.at(turns, row * (width + 1) + column, np.uint8(1))
    turned = turns.reshape(height, width + 1)[:, :width] & 1
    return np.bitwise_xor.accumulate(turned, axis=1).view(bool)


def _crossings(edges: np.ndarray, height: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields where edges cross rows of pixels: int [N] rows, and float64 [N] places in them."""
    u1, v1, u2, v2 = edges.T
    # An edge has its upper end and not its lower one, so that a row through a corner counts once.
    first = np.clip(np.ceil(np.minimum(v1, v2)), 0, height).astype(int)
    counts = np.clip(np.ceil(np.maximum(v1, v2)), 0, height).astype(int) - first
    slope = (u2 - u1) / (v2 - v1)
    crossing = np.flatnonzero(counts)
    ends = np.cumsum(counts[crossing])
    cuts = np.searchsorted(ends, np.arange(_CROSSINGS, ends[-1:].sum(), _CROSSINGS))
    for part in np.split(crossing, np.unique(cuts)):
        number = counts[part]
        edge = np.repeat(part, number)
        in_edge = np.arange(len(edge)) - np.repeat(np.cumsum(number) - number, number)
        row = first[edge] + in_edge
        yield row, u1[edge] + (row - v1[edge]) * slope[edge]
