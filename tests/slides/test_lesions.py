"""Lesions, compared with scikit-image and with disks that are stamped one by one."""

import math
from collections import deque

import numpy as np
import pytest
from skimage import measure

from bef_jax.slides.annotations import read_annotation
from bef_jax.slides.froc.lesions import downsample_of, find_lesions, label_lesions
from tests.slides.truth_files import CORNERS, closed, feature, write_asap, write_geojson, write_mask


def slow_labels(truth, mpp):
    """Returns the evaluation mask, int [H, W], by loops over pixels."""
    height, width = truth.shape
    radius = 75 / (mpp * 2)
    reach = math.ceil(radius)
    widened = np.zeros_like(truth)
    for row, column in np.argwhere(truth):
        for y in range(max(0, row - reach), min(height, row + reach + 1)):
            for x in range(max(0, column - reach), min(width, column + reach + 1)):
                if math.sqrt((y - row) ** 2 + (x - column) ** 2) < radius:
                    widened[y, x] = True
    return measure.label(~outside_of(widened), connectivity=2)


def outside_of(mask):
    """Returns the background that is connected with the border, by flooding."""
    height, width = mask.shape
    border = {(y, x) for y in range(height) for x in range(width)
              if y in (0, height - 1) or x in (0, width - 1)}  # fmt: skip
    found, waiting = np.zeros_like(mask), deque(border)
    while waiting:
        y, x = waiting.popleft()
        if 0 <= y < height and 0 <= x < width and not mask[y, x] and not found[y, x]:
            found[y, x] = True
            waiting.extend([(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)])
    return found


def random_truth(rng, shape=(60, 70)):
    """Returns a few blobs, rings and single pixels, some at the border."""
    rows, columns = np.indices(shape)
    truth = np.zeros(shape, bool)
    for _ in range(rng.integers(0, 7)):
        y, x, outer = rng.integers(-3, shape[0]), rng.integers(-3, shape[1]), rng.uniform(0.5, 16)
        distance = np.hypot(rows - y, (columns - x) * rng.uniform(0.4, 2))
        truth |= (distance <= outer) & (distance >= outer * rng.choice([0, 0.9]))
    return truth


def whole(lesions, shape):
    """Returns the labels of the whole mask."""
    found = np.zeros(shape, int)
    (row, column), (height, width) = lesions.corner, lesions.labels.shape
    found[row : row + height, column : column + width] = lesions.labels
    return found


@pytest.mark.parametrize("seed", range(40))
def test_labels_axes_and_itc_are_those_of_scikit_image(seed, tmp_path):
    rng = np.random.default_rng(seed)
    truth, mpp = random_truth(rng), rng.uniform(0.2, 0.3)
    file = write_mask(tmp_path / "a_mask.tif", truth)
    size = (truth.shape[1] * 32, truth.shape[0] * 32)
    lesions = find_lesions(read_annotation(file, size), size, mpp)
    right = slow_labels(truth, mpp * 32)
    np.testing.assert_array_equal(whole(lesions, truth.shape), right)
    regions = measure.regionprops(right)
    axes = np.array([region.axis_major_length for region in regions]) * mpp * 32
    np.testing.assert_allclose(lesions.longest_axes, axes, rtol=1e-12, atol=1e-9)
    np.testing.assert_array_equal(lesions.is_itc, axes < 275)
    centres = [(np.array(region.centroid[::-1]) + 0.5) * 32 for region in regions]
    np.testing.assert_allclose(lesions.centres, np.reshape(centres, (-1, 2)), rtol=1e-12)
    x, y = rng.uniform(0, size[0], 500), rng.uniform(0, size[1], 500)
    hits = [right[int(b / 32), int(a / 32)] for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(lesions.at(x, y), hits)


def test_a_point_outside_of_the_slide_hits_nothing(tmp_path):
    truth = np.ones((10, 10), bool)
    size = (320, 320)
    file = write_mask(tmp_path / "a_mask.tif", truth)
    lesions = find_lesions(read_annotation(file, size), size, 0.243)
    x = np.array([0, 319.9, 320, -0.1, 1e9])
    np.testing.assert_array_equal(lesions.at(x, np.zeros(5)), [1, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("mpp", "factor"), [(0.243, 32), (0.226, 32), (0.25, 32), (0.5, 16), (0.1, 64), (9.0, 1)]
)
def test_the_mask_has_a_scale_near_7776_nm(mpp, factor):
    assert downsample_of(mpp) == factor


def test_no_tumour_no_lesions():
    lesions = find_lesions(None, (3200, 3200), 0.243)
    assert len(lesions.is_itc) == 0
    np.testing.assert_array_equal(lesions.at(np.array([5.0]), np.array([5.0])), [0])
    assert label_lesions(np.zeros((5, 5), bool), 7.776)[0].size == 0


@pytest.mark.parametrize("size", [(3200, 3200), (3231, 3201)])
def test_masks_of_255_and_1_and_polygons_give_the_same_lesions(size, tmp_path):
    corners = np.array(CORNERS) * 17
    write_asap(tmp_path / "a.xml", [("Tumor", corners)])
    write_geojson(tmp_path / "a.json", [feature([closed(corners)])])
    truth = read_annotation(tmp_path / "a.xml", size).area(0, 0, (1, 1), size[::-1])
    found = []
    write_mask(tmp_path / "255_mask.tif", truth, 255, tile=(256, 256), compression="deflate")
    write_mask(tmp_path / "1_mask.tif", truth, 1)
    for name in ("a.xml", "a.json", "255_mask.tif", "1_mask.tif"):
        found.append(find_lesions(read_annotation(tmp_path / name, size), size, 0.243))
    assert len(found[0].is_itc) == 1
    for each in found[1:]:
        np.testing.assert_array_equal(each.labels, found[0].labels)
        assert each.corner == found[0].corner
        np.testing.assert_array_equal(each.longest_axes, found[0].longest_axes)
