"""probability.tif and mask.png, read back, and what of a map is drawn over a slide."""

from itertools import pairwise

import numpy as np
import pytest
import tifffile
from PIL import Image

from bef_jax.data.patch import Tiling
from bef_jax.slides.outputs import maps
from bef_jax.slides.outputs.maps import layer_of, write_heatmap, write_mask, write_probability
from bef_jax.slides.outputs.window_map import gather
from bef_jax.slides.tiles import Grid
from tests.memory import growth_of
from tests.slides.outputs.fake_slide import FakeSlide, map_of, windows_of

CLASSES = ("normal", "metastasis")


def write(file, probability, classes=CLASSES, **options):
    found, slide = map_of(probability, **options)
    write_probability(file, found, windows_of(probability), classes)
    return found, slide


def noise(shape, seed=0):
    rng = np.random.default_rng(seed)
    probability = rng.random(shape)
    probability[rng.random(shape[:2]) < 0.3] = np.nan
    probability[rng.random(shape[:2]) < 0.1] = -1
    return probability


def greatest_of_four(plane):
    """Loops over squares of 2 x 2 pixels."""
    found = np.full((-(-plane.shape[0] // 2), -(-plane.shape[1] // 2)), np.nan, np.float32)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            square = plane[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            known = square[~np.isnan(square)]
            if known.size:
                found[row, column] = known.max()
    return found


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (256, 256), (257, 30), (300, 1100)])
def test_the_tiff_has_the_probabilities_in_all_levels(shape, tmp_path):
    probability = noise(shape)
    write(tmp_path / "a.tif", probability)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        (series,) = file.series
        assert file.is_ome and series.axes == "YX" and series.dtype == np.float32
        expected = np.where(probability < 0, np.nan, probability).astype(np.float32)
        for level in series.levels:
            np.testing.assert_array_equal(level.asarray().reshape(expected.shape), expected)
            expected = greatest_of_four(expected)
        assert max(series.levels[-1].shape) <= 256
        assert len(series.levels) == 1 or max(series.levels[-2].shape) > 256
        assert all(level.pages[0].is_tiled for level in series.levels)


def test_smaller_levels_say_their_own_scale(tmp_path):
    write(tmp_path / "a.tif", noise((2, 600)))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        levels = file.series[0].levels
        scales = [np.divide(*level.pages[0].tags["XResolution"].value) for level in levels]
    assert np.divide(scales[0], scales) == pytest.approx([1, 2, 4], rel=1e-6)


def ome_of(file):
    with tifffile.TiffFile(file) as stream:
        image = tifffile.xml2dict(stream.ome_metadata)["OME"]["Image"]
        return image, stream.pages[0].tags


@pytest.mark.parametrize("stride", [8, 32, 64])
@pytest.mark.parametrize("scale", [(4.0, 4.0), (1.9478957915831663, 2.017)])
def test_the_tiff_says_where_its_pixels_lie(stride, scale, tmp_path):
    """A pixel's middle is the middle of its window, whose corner the grid says."""
    found, slide = write(tmp_path / "a.tif", noise((5, 7)), stride=stride, scale=scale)
    image, tags = ome_of(tmp_path / "a.tif")
    pixels, plane = image["Pixels"], image["Pixels"]["Plane"]
    corners = found.grid.corners(np.arange(5), np.arange(7))
    for name, axis in (("X", 0), ("Y", 1)):
        size, first = pixels[f"PhysicalSize{name}"], plane[f"Position{name}"]
        assert pixels[f"PhysicalSize{name}Unit"] == plane[f"Position{name}Unit"] == "µm"
        middles = (corners[axis] + 16 * scale[axis]) * slide.mpp
        np.testing.assert_allclose(first + size * (np.arange(len(middles)) + 0.5), middles)
        per_cm = np.divide(*tags[f"{name}Resolution"].value)
        assert per_cm == pytest.approx(1e4 / size, rel=1e-6)
    assert tags["ResolutionUnit"].value == 3  # centimetre


def test_more_classes_have_a_channel_each(tmp_path):
    names = ("a", 'b "<&>"', "腫瘍\x1b")
    probability = np.random.default_rng(0).dirichlet(np.ones(3), (40, 300)).astype(np.float32)
    probability[:10, :10], probability[20] = np.nan, -1
    write(tmp_path / "a.tif", probability, names)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        (series,) = file.series
        assert series.axes == "CYX" and [level.shape for level in series.levels] == [
            (3, 40, 300),
            (3, 20, 150),
        ]
        expected = np.where(probability < 0, np.nan, probability).transpose(2, 0, 1)
        np.testing.assert_array_equal(series.asarray(), expected)
        smaller = np.stack([greatest_of_four(plane) for plane in expected])
        np.testing.assert_array_equal(series.levels[1].asarray(), smaller)
    channels = ome_of(tmp_path / "a.tif")[0]["Pixels"]["Channel"]
    assert [channel["Name"] for channel in channels] == ["a", "b _____", "腫瘍\\x1b"]


def test_of_very_many_classes_there_is_one_channel(tmp_path):
    probability = np.random.default_rng(0).dirichlet(np.ones(65), (4, 5))
    write(tmp_path / "a.tif", probability, tuple(map(str, range(65))))
    found = tifffile.imread(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, probability.max(axis=-1).astype(np.float32))


def test_equal_maps_give_equal_bytes_and_others_another_id(tmp_path):
    ids = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, noise((30, 40), seed))
        with tifffile.TiffFile(tmp_path / name) as file:
            ids.append(tifffile.xml2dict(file.ome_metadata)["OME"]["UUID"])
            assert "DateTime" not in file.pages[0].tags
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert ids[0] == ids[1] != ids[2]


def test_the_mask_tells_tissue_glass_and_failed(tmp_path):
    found, _ = map_of(np.array([[0.2, np.nan], [-1, 0.9], [np.nan, -1]]))
    write_mask(tmp_path / "a.png", found)
    mask = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(mask, [[255, 0], [127, 255], [0, 127]])


# ---- what is drawn ------------------------------------------------------------------------------


def cells_of_pixels(count, borders):
    """Returns the cells of each pixel: the one that it begins in, and those that begin in it."""
    begins = np.arange(count) * borders[-1] / count
    first = [max(i for i, border in enumerate(borders[:-1]) if border <= x) for x in begins]
    return [range(a, max(b, a + 1)) for a, b in pairwise([*first, len(borders) - 1])]


@pytest.mark.parametrize("shape", [(3, 5), (97, 41), (300, 140)])
@pytest.mark.parametrize("stride", [16, 32])
def test_a_pixel_has_the_greatest_of_its_cells(shape, stride, monkeypatch):
    monkeypatch.setattr(maps.heatmap, "SMALL", 60)
    probability = noise(shape)
    found, _ = map_of(probability, stride=stride)
    layer, (x, y) = layer_of(found, True), found.borders()
    assert max(layer.shape) == 60
    known = np.where(probability < 0, np.nan, probability).astype(np.float32)
    rows, columns = cells_of_pixels(layer.shape[0], y), cells_of_pixels(layer.shape[1], x)
    for (row, column), value in np.ndenumerate(layer):
        area = known[np.ix_(rows[row], columns[column])]
        area = area[~np.isnan(area)]
        assert value == area.max() if area.size else np.isnan(value)
    assert np.nanmax(layer) == np.nanmax(known)  # so no window is lost


def test_a_pixel_has_the_class_of_its_most_certain_cell(monkeypatch):
    monkeypatch.setattr(maps.heatmap, "SMALL", 41)
    rng = np.random.default_rng(0)
    probability = rng.dirichlet(np.ones(4), (100, 90))
    probability[:20], probability[50, 50] = np.nan, -1
    found, _ = map_of(probability)
    layer, (x, y) = layer_of(found, False), found.borders()
    rows, columns = cells_of_pixels(layer.shape[0], y), cells_of_pixels(layer.shape[1], x)
    for (row, column), value in np.ndenumerate(layer):
        area = np.nan_to_num(probability[np.ix_(rows[row], columns[column])]).reshape(-1, 4)
        best = area.max(axis=1).argmax()
        assert value == (area[best].argmax() if area[best].max() > 0 else -1)


@pytest.mark.parametrize(
    ("value", "why"), [(np.nan, "no tissue"), (-1, "no window can be decoded")]
)
def test_a_slide_without_decided_windows_is_drawn_plainly(value, why, tmp_path):
    found, slide = map_of(np.full((4, 4), value))
    assert layer_of(found, True) == why
    write_heatmap(tmp_path / "a.png", slide, why, 0.5, CLASSES)
    assert Image.open(tmp_path / "a.png").size[0] < 1400


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (16, 16), (40, 100_000), (100_000, 40)])
def test_slides_of_any_shape_are_drawn(width, height, classes, tmp_path):
    rows, columns = -(-height // 128), -(-width // 128)
    sides = -(-width // 4), -(-height // 4)
    grid = Grid(Tiling(96, 32, 32), 0, (4.0, 4.0), (4.0, 4.0), *sides, rows, columns, 1.0)
    shape = (rows, columns) if classes == 2 else (rows, columns, classes)
    probability = np.random.default_rng(0).random(shape)
    slide, names = FakeSlide(width, height), tuple(map(str, range(classes)))
    found = gather(slide, grid, windows_of(probability)(), 0.5)
    write_heatmap(tmp_path / "a.png", slide, layer_of(found, classes == 2), 0.5, names)
    with Image.open(tmp_path / "a.png") as drawn:
        assert min(drawn.size) > 100


@pytest.mark.slow
def test_memory_of_many_channels_does_not_grow_with_all_levels(tmp_path):
    probability = np.random.default_rng(0).random((1000, 1000, 4)).astype(np.float32)
    found, _ = map_of(probability)
    windows = windows_of(probability)
    names = tuple("abcd")
    grown = growth_of(lambda: write_probability(tmp_path / "a.tif", found, windows, names))
    assert grown < 60 << 20
