"""Outlines of regions on a grid, as rings of corners that go along the borders of cells.

Each side of a cell that separates two regions is an edge. An edge goes clockwise around its region
on a screen, where y points down: right along a cell's top, down along its right side, and so on.
So the region is always on the right hand.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_MOST = 1 << 18  # edges that are joined to rings at a time, or those of one region
_REGION = 32  # the bits of an edge's region begin here
_PLACE = (1 << _REGION) - 1  # the bits of its vertex and heading


class Outlines(NamedTuple):
    """The rings of all regions.

    Attributes:
        rows: int32 [P], corners of all rings, one ring after another; corner (r, c) is the upper
            left one of cell (r, c). A ring's first corner is not repeated at its end.
        columns: int32 [P].
        starts: int [Q + 1], where each ring begins, and P.
        regions: int32 [Q], the region of each ring, ascending. The first ring of a region goes
            around it, and the others around its holes.
    """

    rows: np.ndarray
    columns: np.ndarray
    starts: np.ndarray
    regions: np.ndarray


def trace(labels: np.ndarray) -> Outlines:
    """Returns the outlines of regions.

    No ring touches itself, and all corners are needed. Rings of the same region may touch at
    corners, as the rings of a valid polygon may.

    Args:
        labels: int [rows, columns], 0 for no region; each region is joined over sides of cells.
    """
    # The margin of 0 is outside of all regions, so the sides of the grid are like any others.
    width, cells = labels.shape[1] + 2, np.pad(labels, 1).reshape(-1)
    edges = _edges(cells, width)
    nothing = (np.zeros(0, np.int32),) * 4
    parts = [nothing, *(_trace(part, cells, width) for part in _parts(edges))]
    rows, columns, lengths, regions = map(np.concatenate, zip(*parts, strict=True))
    return Outlines(rows, columns, np.concatenate([[0], np.cumsum(lengths)]), regions)


def _edges(cells: np.ndarray, width: int) -> np.ndarray:
    """Returns all edges, int64, ascending, so that those of a region lie side by side.

    An edge is region * 2**32 + 4 * vertex + heading. The heading is 0 for right, 1 for down, 2 for
    left and 3 for up. It begins at a vertex, whose number is that of the cell above and left of it.

    Args:
        cells: int [(rows + 2) * width], labels with a margin of 0.
        width: columns + 2.
    """
    margin, found = width + 1, []
    middle = cells[margin:-margin]
    for heading, across in enumerate((-width, 1, width, -1)):
        beside = cells[margin + across : len(cells) - margin + across]
        places = np.flatnonzero((middle != 0) & (middle != beside))
        regions = middle[places].astype(np.int64) << _REGION
        found.append(regions | (4 * (places + margin - _right(width)[heading]) + heading))
    edges = np.concatenate(found)
    edges.sort()
    return edges


def _right(width: int) -> np.ndarray:
    """Returns the way from a vertex to the cell ahead on the right hand, for each heading."""
    return np.array([width + 1, width, 0, 1])


def _parts(edges: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the edges of whole regions, not many at a time, so that little memory is needed."""
    start = 0
    while start < len(edges):
        stop = min(start + _MOST, len(edges))
        beyond = ((edges[stop - 1] >> _REGION) + 1) << _REGION
        stop = int(np.searchsorted(edges, beyond))
        yield edges[start:stop]
        start = stop


def _trace(edges: np.ndarray, cells: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
    """Returns rows and columns of corners, and the number of corners and the region of rings."""
    order, starts = _in_rings(_following(edges, cells, width))
    regions = edges[order[starts[:-1]]] >> _REGION
    order, starts = _corners(edges & 3, order, starts)
    rows, columns = np.divmod((edges[order] & _PLACE) >> 2, width)
    return tuple(x.astype(np.int32) for x in (rows, columns, np.diff(starts), regions))


def _following(edges: np.ndarray, cells: np.ndarray, width: int) -> np.ndarray:
    """Returns the number of the edge that follows each edge in its ring."""
    headings, regions, right = edges & 3, edges >> _REGION, _right(width)
    ends = ((edges & _PLACE) >> 2) + np.array([1, width, -1, -width])[headings]
    # The cell ahead on the left is the one on the right after a turn to the left. Look at it first:
    # where two cells of a region touch at a corner only, rings then cross from one to the other,
    # and so each of the two outer places has its own ring.
    is_left = cells[ends + right[headings - 1]] == regions
    is_right = cells[ends + right[headings]] == regions
    turns = np.where(is_left, 3, np.where(is_right, 0, 1))
    return np.searchsorted(edges, regions << _REGION | 4 * ends | (headings + turns) % 4)


def _in_rings(following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns edges ring by ring, and where each ring begins.

    Rings are sorted by their first edge, which is their smallest. So they are sorted by region, and
    the outer ring is the first of a region, because the smallest edge of a region lies on it.
    """
    least = _least_of_ring(following)
    left = _steps_to_end(following, least)
    firsts = np.flatnonzero(least == np.arange(len(least)))
    ends = np.cumsum(left[firsts] + 1)
    last = np.zeros_like(least)  # for a ring's first edge: the place of its last one
    last[firsts] = ends - 1
    order = np.empty_like(least)
    order[last[least] - left] = np.arange(len(least))
    return order, np.concatenate([[0], ends])


def _least_of_ring(following: np.ndarray) -> np.ndarray:
    """Returns the smallest edge of each edge's ring; each step looks twice as far ahead."""
    least, ahead = np.arange(len(following)), following
    while True:
        smaller = np.minimum(least, least[ahead])
        # If looking further changes nothing anywhere, all of each ring has been seen.
        if np.array_equal(smaller, least):
            return least
        least, ahead = smaller, ahead[ahead]


def _steps_to_end(following: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Returns how many edges follow each edge before its ring's first one comes again."""
    is_last = following == least
    ahead = np.where(is_last, np.arange(len(following)), following)
    steps = 1 - is_last.astype(following.dtype)
    while (more := steps[ahead]).any():
        steps += more
        ahead = ahead[ahead]
    return steps


def _corners(
    headings: np.ndarray, order: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out the edges that go straight on from the edge before."""
    before = np.roll(order, 1)
    before[starts[:-1]] = order[starts[1:] - 1]
    is_corner = headings[order] != headings[before]
    counts = np.concatenate([[0], np.cumsum(is_corner)])
    return order[is_corner], counts[starts]
