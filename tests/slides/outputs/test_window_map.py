"""The map of a slide's windows: what is in it, and where its cells lie."""

from dataclasses import replace

import numpy as np
import pytest

from tests.slides.outputs.fake_slide import grid_of, map_of


def test_a_map_has_what_was_decided():
    probability = np.array([[0.4, 0.5, np.nan], [-1, 0.9, 0.1]])
    found, _ = map_of(probability)
    np.testing.assert_array_equal(found.probability, [[0.4, 0.5, np.nan], [np.nan, 0.9, 0.1]])
    np.testing.assert_array_equal(found.tissue, [[1, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(found.failed, [[0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(found.called == 1, [[0, 1, 0], [0, 1, 0]])


def test_of_many_classes_the_most_probable_is_called():
    probability = np.array([[[0.2, 0.5, 0.3], [np.nan] * 3, [-1] * 3, [0.4, 0.2, 0.4]]])
    found, _ = map_of(probability)
    np.testing.assert_array_equal(found.probability, [[0.5, np.nan, np.nan, 0.4]])
    np.testing.assert_array_equal(found.tissue, [[1, 0, 0, 1]])
    np.testing.assert_array_equal(found.failed, [[0, 0, 1, 0]])
    assert found.called[0, [0, 3]].tolist() == [1, 0]


@pytest.mark.parametrize("stride", [8, 20, 32, 50])
@pytest.mark.parametrize("scale", [(4.0, 4.0), (1.9478957915831663, 2.017)])
def test_a_place_belongs_to_the_window_whose_middle_is_nearest(stride, scale):
    found, slide = map_of(np.zeros((6, 9)), stride=stride, scale=scale)
    grid, _ = grid_of(6, 9, stride=stride, scale=scale)
    for axis, (borders, count) in enumerate(zip(found.borders(), (9, 6), strict=True)):
        assert borders[0] == 0 and borders[-1] == slide.levels[0][axis]
        assert (np.diff(borders) > 0).all()
        corners = grid.corners(np.arange(6), np.arange(9))[axis]
        places = np.linspace(0.02, borders[-1] - 0.02, 777)
        nearest = np.abs(places[:, None] - corners - 16 * scale[axis]).argmin(axis=1)
        cell = np.searchsorted(borders, places) - 1
        # A border has two decimals, so a place next to it may belong to either side.
        is_near = np.abs(places[:, None] - borders).min(axis=1) < 0.011
        assert ((cell == nearest) | is_near).all()
        assert set(cell) == set(range(count))


def test_a_last_cell_that_rounding_would_empty_is_still_there():
    """The last window begins 0.004 pixels before the slide's edge."""
    found, _ = map_of(np.zeros((1, 3)))
    scale = 124.996 / 64
    found = replace(found, size=(125, 50), grid=replace(found.grid, scale=(scale, scale)))
    x, _ = found.borders()
    assert x[-1] == 125
    assert (np.diff(x) > 0).all()
