"""Regions of a slide as GeoJSON, compared with shapely and with loops over windows."""

import gzip
import itertools
import json
import math
import time

import numpy as np
import pytest
import shapely
from scipy import ndimage
from shapely.geometry import shape

from bef_jax.slides.outputs import regions as outputs_regions
from bef_jax.slides.outputs.regions import find_regions, geojson, lesion_class, write_regions
from tests.slides.outputs.fake_slide import grid_of, map_of

CLASSES = ("normal", "metastasis")


def features_of(found, classes=CLASSES):
    collection = json.loads("".join(geojson(find_regions(found), classes)))
    assert collection["type"] == "FeatureCollection"
    return collection["features"]


def noise(shape, seed=0):
    rng = np.random.default_rng(seed)
    probability = rng.random(shape)
    probability[rng.random(shape) < 0.1] = np.nan
    probability[rng.random(shape) < 0.05] = -1  # failed
    return probability


@pytest.mark.parametrize("scale", [(4.0, 4.0), (1.9478957915831663, 1.9541234)])
def test_each_region_says_what_its_windows_say(scale):
    probability = noise((40, 30))
    found, slide = map_of(probability, scale=scale)
    labels, count = ndimage.label(np.nan_to_num(probability) >= 0.5)
    features, (x, y) = features_of(found), found.borders()
    assert len(features) == count
    seen = set()
    for feature in features:
        polygon, said = shape(feature["geometry"]), feature["properties"]["measurements"]
        assert polygon.is_valid
        # The region that has the middle of the polygon's first cell.
        point = polygon.representative_point()
        row, column = np.searchsorted(y, point.y) - 1, np.searchsorted(x, point.x) - 1
        area = labels == labels[row, column]
        seen.add(labels[row, column])
        assert said["probability"] == pytest.approx(probability[area].max(), rel=1e-3)
        assert said["mean probability"] == pytest.approx(probability[area].mean(), rel=1e-3)
        assert said["area um^2"] == pytest.approx(polygon.area * slide.mpp**2, abs=0.06)
        corners = polygon.exterior.coords
        longest = max(math.dist(a, b) for a, b in itertools.combinations(corners, 2))
        assert said["diameter um"] == pytest.approx(longest * slide.mpp, abs=0.06)
        cells = [shapely.box(x[c], y[r], x[c + 1], y[r + 1]) for r, c in np.argwhere(area).tolist()]
        assert polygon.symmetric_difference(shapely.unary_union(cells)).area < 1e-6
    assert seen == set(range(1, count + 1))


def test_a_feature_is_one_that_qupath_opens():
    probability = np.full((3, 3), 0.1)
    probability[1, 1] = 0.75
    found, _ = map_of(probability)
    assert features_of(found) == [
        {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[128, 128], [256, 128], [256, 256], [128, 256], [128, 128]]],
            },
            "properties": {
                "objectType": "annotation",
                "name": "metastasis 1",
                "classification": {"name": "metastasis", "color": [213, 94, 0]},
                "measurements": {
                    "probability": 0.75,
                    "mean probability": 0.75,
                    "area um^2": 1024.0,
                    "diameter um": 45.3,
                },
            },
        }
    ]


@pytest.mark.parametrize("stride", [8, 32, 64])
@pytest.mark.parametrize("scale", [(4.0, 4.0), (1.9478957915831663, 2.017)])
def test_regions_end_at_the_slide_and_cover_it(stride, scale):
    """All windows are positive, so that the only region is the whole slide."""
    found, slide = map_of(np.ones((5, 7)), stride=stride, scale=scale)
    (feature,) = features_of(found)
    width, height = slide.levels[0][:2]
    assert shape(feature["geometry"]).equals(shapely.box(0, 0, width, height))
    for point in feature["geometry"]["coordinates"][0]:
        assert [round(value, 2) for value in point] == point


def test_a_slide_smaller_than_a_window_has_a_region():
    _, slide = grid_of(1, 1, stride=8, scale=(1.0, 1.0))
    assert slide.levels[0].width == 16
    found, _ = map_of(np.ones((1, 1)), stride=8, scale=(1.0, 1.0))
    (feature,) = features_of(found)
    assert shape(feature["geometry"]).bounds == (0, 0, 16, 16)


def test_rings_have_the_directions_of_the_standard():
    probability = np.ones((5, 5))
    probability[2, 2] = 0
    (feature,) = features_of(map_of(probability)[0])
    outer, hole = map(shapely.LinearRing, feature["geometry"]["coordinates"])
    assert outer.is_ccw and not hole.is_ccw
    assert outer.is_closed and hole.is_closed


def test_regions_of_many_classes_have_the_classes_that_are_called():
    rng = np.random.default_rng(0)
    called = rng.integers(0, 3, (12, 9))
    probability = np.full((12, 9, 3), 0.2)
    np.put_along_axis(probability, called[..., None], 0.6, axis=-1)
    names = ("background", 'a "quoted" <name>', "腫瘍\n")
    features = features_of(map_of(probability)[0], names)
    x, y = map_of(probability)[0].borders()
    for number in (1, 2):
        expected = shapely.unary_union(
            [
                shapely.box(x[c], y[r], x[c + 1], y[r + 1])
                for r, c in np.argwhere(called == number).tolist()
            ]
        )
        name = names[number].replace("\n", "\\n")
        chosen = [f for f in features if f["properties"]["classification"]["name"] == name]
        assert len(chosen) == ndimage.label(called == number)[1]
        polygons = shapely.unary_union([shape(feature["geometry"]) for feature in chosen])
        assert polygons.equals(expected)
    assert len(features) == sum(ndimage.label(called == number)[1] for number in (1, 2))
    assert len({tuple(f["properties"]["classification"]["color"]) for f in features}) == 2


@pytest.mark.parametrize(
    ("diameter", "name"),
    [(0, "none"), (44, "ITC"), (199.9, "ITC"), (200, "micro"), (2000, "micro"), (2000.1, "macro")],
)
def test_a_lesion_has_its_class(diameter, name):
    assert lesion_class(diameter) == name


def test_a_slide_without_regions_has_an_empty_collection(tmp_path):
    write_regions(tmp_path / "a.gz", find_regions(map_of(np.full((3, 3), np.nan))[0]), CLASSES)
    content = json.loads(gzip.decompress((tmp_path / "a.gz").read_bytes()))
    assert content == {"type": "FeatureCollection", "features": []}


def test_of_a_large_region_the_longest_diameter_is_that_of_all_corners():
    y, x = np.mgrid[:60, :60]
    disc = np.hypot((y - 30) / 25, (x - 29) / 17) < 1
    found, _ = map_of(np.where(disc, 0.9, 0.1))
    regions = find_regions(found)
    rows, columns = regions.outlines.rows, regions.outlines.columns
    points = np.stack([columns, rows], axis=1) * 128 * 0.25
    longest = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)).max()
    np.testing.assert_allclose(regions.diameters, [longest])


@pytest.mark.parametrize(("classes", "name"), [(CLASSES, "2"), (("glass", "a", "b"), "b 2")])
def test_features_of_many_regions_have_names_and_measurements_only(classes, name, monkeypatch):
    monkeypatch.setattr(outputs_regions, "_MANY", 1)
    probability = np.full((1, 3), 0.9)
    probability[0, 1] = 0.1
    if len(classes) == 3:
        probability = np.array([[[0.1, 0.9, 0.0], [1.0, 0.0, 0.0], [0.1, 0.0, 0.9]]])
    properties = features_of(map_of(probability)[0], classes)[1]["properties"]
    measurements = properties.pop("measurements")
    assert properties == {"name": name}
    assert list(measurements) == ["probability", "area um^2", "diameter um"]
    assert measurements["probability"] == 0.9


@pytest.mark.parametrize("side", [150, pytest.param(448, marks=pytest.mark.slow)])
def test_many_small_regions_are_written_in_little_time_and_few_bytes(side):
    """Compares the time with that of reading the text, so that slow machines pass, too."""
    probability = np.full((side, side), 0.1)
    probability[::2, ::2], probability[1::2, 1::2] = 0.87654, 0.98765
    found, _ = map_of(probability)
    start = time.process_time()
    text = "".join(geojson(find_regions(found), CLASSES))
    writing = time.process_time() - start
    start = time.process_time()
    features = json.loads(text)["features"]
    reading = time.process_time() - start
    assert len(features) == side**2 // 2
    assert writing < 5 * reading
    limit = 250 if side == 448 else 375  # bytes for each; a file of many regions has less text
    assert len(text) < limit * len(features)
    polygons = shapely.polygons([f["geometry"]["coordinates"][0] for f in features])
    assert shapely.is_valid(polygons).all()
    # The cells of the last row and column end in their middle, at the edge of the slide.
    sides = np.full(side, 128.0)
    sides[-1] = 64
    areas = np.outer(sides, sides)[probability > 0.5]
    assert shapely.area(polygons).sum() == areas.sum()
