"""Outlines of regions, compared with shapely: their cells, area, direction and validity."""

import numpy as np
import pytest
import shapely
from scipy import ndimage

from bef_jax.slides.outputs import outlines
from bef_jax.slides.outputs.outlines import trace


def polygons_of(labels):
    """Returns a polygon of each region, by its number."""
    found = trace(labels)
    rings = {}
    for number, start, stop in zip(
        found.regions.tolist(), found.starts[:-1], found.starts[1:], strict=True
    ):
        corners = np.stack([found.columns[start:stop], found.rows[start:stop]], axis=1)
        rings.setdefault(number, []).append(corners)
    return {number: shapely.Polygon(first, rest) for number, (first, *rest) in rings.items()}


def covered(polygon, shape):
    """Returns the cells whose middle lies in a polygon."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return shapely.contains_xy(polygon, x, y)


@pytest.mark.parametrize("seed", range(200))
def test_outlines_of_random_masks_cover_them_exactly(seed, monkeypatch):
    if seed % 2:
        monkeypatch.setattr(outlines, "_MOST", 5)  # each part then has one region or two
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 25, 2)
    labels, count = ndimage.label(rng.random(shape) < rng.uniform(0.2, 0.8))
    polygons = polygons_of(labels)
    assert sorted(polygons) == list(range(1, count + 1))
    for number, polygon in polygons.items():
        assert polygon.is_valid, shapely.is_valid_reason(polygon)
        assert polygon.area == (labels == number).sum()
        assert (covered(polygon, labels.shape) == (labels == number)).all()


@pytest.mark.parametrize("seed", range(20))
def test_all_corners_are_needed_and_rings_have_their_direction(seed):
    rng = np.random.default_rng(seed)
    labels, _ = ndimage.label(rng.random((15, 15)) < 0.6)
    for polygon in polygons_of(labels).values():
        assert polygon.exterior.is_ccw
        assert not any(ring.is_ccw for ring in polygon.interiors)
        for ring in (polygon.exterior, *polygon.interiors):
            steps = np.diff(np.array(ring.coords), axis=0)
            assert (np.abs(steps).sum(axis=1) > 0).all()
            # Each step is horizontal or vertical, and the next one is the other.
            is_horizontal = steps[:, 1] == 0
            assert ((steps == 0).sum(axis=1) == 1).all()
            assert (is_horizontal != np.roll(is_horizontal, 1)).all()


def test_neighbouring_regions_have_outlines_of_their_own():
    labels = np.array([[1, 1, 2], [3, 1, 2], [3, 3, 3]])
    areas = {number: polygon.area for number, polygon in polygons_of(labels).items()}
    assert areas == {1: 3, 2: 2, 3: 4}


def test_a_ring_that_closes_at_a_corner_has_a_hole():
    """The two ends of a ring of cells touch at a corner, so the place inside is a hole."""
    mask = np.array([[0, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]])
    labels, count = ndimage.label(mask)
    assert count == 1
    (polygon,) = polygons_of(labels).values()
    assert polygon.is_valid
    assert [ring.envelope.area for ring in polygon.interiors] == [4]


def test_nothing_has_no_outlines():
    found = trace(np.zeros((3, 4), np.int32))
    assert len(found.rows) == len(found.regions) == 0
    assert found.starts.tolist() == [0]
