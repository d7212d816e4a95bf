"""Heat maps, compared with small expected arrays and with loops over pixels."""

import os
import shutil

import matplotlib
import numpy as np
import pytest
from PIL import Image

from bef_jax.scoring import heatmap
from bef_jax.scoring.heatmap import (
    ClassTiles,
    TileProbabilities,
    write_class_maps,
    write_heatmap,
)
from tests.memory import growth_of


def tiles(*squares, side=32):
    found = TileProbabilities(side)
    for square in squares:
        found.add(*square)
    return found


def test_each_pixel_has_the_largest_probability_of_its_squares():
    found = tiles((0, 0, 0.2), (0, 32, 0.9), (0, 16, 0.5)).to_array(96, 96, 1)
    expected = np.full((96, 96), np.nan)
    expected[:32, :16], expected[:32, 16:32], expected[:32, 32:64] = 0.2, 0.5, 0.9
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("stride", [20, 50, 64])
def test_squares_of_any_side_are_drawn_whole(stride):
    """Compares with a loop over pixels; between squares that lie far apart, nothing is known."""
    squares = [(y, x, (3 * y + x) / 1000) for y in (0, stride) for x in (0, stride)]
    found = tiles(*squares, side=50).to_array(130, 120, 1)
    for y in range(130):
        for x in range(120):
            over = [p for top, left, p in squares if 0 <= y - top < 50 and 0 <= x - left < 50]
            assert found[y, x] == np.float32(max(over)) if over else np.isnan(found[y, x])


@pytest.mark.parametrize("scale", [2, 3, 5])
def test_a_reduced_map_has_the_largest_probability_of_each_area(scale):
    squares = [(y, x, (y + x) / 200) for y in (0, 32, 64) for x in (0, 32, 64)]
    whole = tiles(*squares).to_array(96, 96, 1)
    small = tiles(*squares).to_array(96, 96, scale)
    for row in range(small.shape[0]):
        for column in range(small.shape[1]):
            area = np.s_[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale]
            assert small[row, column] == whole[area].max()


def pixels_of(drawing):
    return np.asarray(Image.open(drawing).convert("RGB")).astype(int)


def test_the_drawing_differs_only_in_the_square_that_differs(tmp_path):
    picture, file = tmp_path / "grey.png", tmp_path / "maps" / "a.png"
    Image.fromarray(np.full((192, 192, 3), 128, np.uint8)).save(picture)
    *corners, last = [(y, x) for y in range(0, 192, 32) for x in range(0, 192, 32)]
    drawn = []
    for higher in ([], [(64, 96)], corners):
        squares = [(*corner, 0.2 if corner in higher else 0.1) for corner in corners]
        # The last square keeps the largest probability, which the title shows.
        write_heatmap(file, picture, tiles(*squares, (*last, 0.3)), 0.5)
        drawn.append(pixels_of(file))
    # The places of the drawing that change with one square, and with all squares but the last.
    one, most = (np.argwhere((drawn[0] != other).any(axis=2)) for other in drawn[1:])
    # `most` reaches all sides of the map, which is on the right of the drawing. The map is drawn at
    # another size than the picture's 192 pixels.
    start, length = most.min(axis=0), np.ptp(most, axis=0)
    assert start[1] > drawn[0].shape[1] * 0.45
    np.testing.assert_allclose((one.min(axis=0) - start) / length * 192, (64, 96), atol=1)
    np.testing.assert_allclose((one.max(axis=0) - start) / length * 192, (96, 128), atol=1)
    assert len(one) == np.prod(np.ptp(one, axis=0) + 1)  # the square is full


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_map_is_drawn_when_nothing_or_everything_is_found(probability, tmp_path):
    Image.fromarray(np.zeros((96, 128, 3), np.uint8)).save(tmp_path / "a.png")
    squares = [(y, x, probability) for y in (0, 32, 64) for x in (0, 32, 64, 96)]
    write_heatmap(tmp_path / "out.png", tmp_path / "a.png", tiles(*squares), 0.5)
    # The map has an opacity of 0.6, over a black picture.
    colour = 0.6 * 255 * np.array(matplotlib.colormaps["cividis"](probability)[:3])
    is_map = (np.abs(pixels_of(tmp_path / "out.png") - colour) < 3).all(axis=2)
    assert is_map.mean() > 0.35


@pytest.mark.parametrize("name", ["$\\frac{1$.png", b"\xff.png"], ids=["formula", "not text"])
def test_a_map_is_drawn_when_a_name_is_a_formula_or_not_text(name, tmp_path):
    picture = tmp_path / os.fsdecode(name)
    Image.fromarray(np.zeros((96, 128, 3), np.uint8)).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", picture)
    write_heatmap(tmp_path / "out.png", picture, tiles((0, 0, 0.5)), 0.5)
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")  # matplotlib warns of letters that its font lacks
@pytest.mark.parametrize("positive", ["腫瘍", "tumour 腫瘍", "$x", "a\x1b[31m"])
def test_a_map_is_drawn_whatever_the_class_is_called(positive, tmp_path):
    Image.fromarray(np.zeros((96, 128, 3), np.uint8)).save(tmp_path / "a.png")
    found, names = tiles((0, 0, 0.5)), ("normal", positive)
    write_heatmap(tmp_path / "out.png", tmp_path / "a.png", found, 0.5, names)
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize("shape", [(96, 153_600), (153_600, 96)], ids=["wide", "high"])
def test_a_strip_is_stretched_so_that_it_is_visible(shape, tmp_path):
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / "strip.png")
    squares = [(0, 0, 0.1), (shape[0] - 32, shape[1] - 32, 0.9)]
    write_heatmap(tmp_path / "out.png", tmp_path / "strip.png", tiles(*squares), 0.5)
    assert min(Image.open(tmp_path / "out.png").size) > 200


def test_a_reduced_picture_has_the_mean_of_each_square(monkeypatch):
    """Reduces the picture in several bands, and compares with a loop over squares."""
    monkeypatch.setattr(heatmap, "_BAND", 3000)
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    found = heatmap._reduced(pixels, 7)
    assert found.shape == (14, 19, 3)
    for row in range(14):
        for column in range(19):
            square = pixels[row * 7 : row * 7 + 7, column * 7 : column * 7 + 7]
            assert np.abs(found[row, column] - square.mean((0, 1))).max() < 1


@pytest.mark.parametrize(
    ("picture", "name"),
    [("big.png", "big.png"), ("a/big.tif", "a/big.tif.png"), ("big.PNG", "big.PNG.png"),
     ("x" * 247 + ".png", "x" * 247 + ".png"), ("x" * 251 + ".tif", "x" * 251 + ".png"),
     ("a/" + "x" * 250 + ".tiff", "a/" + "x" * 250 + ".png")],
)  # fmt: skip
def test_a_map_is_named_after_its_picture(picture, name):
    assert heatmap.name_of(picture) == name


def test_only_maps_and_empty_folders_are_removed(tmp_path):
    Image.fromarray(np.zeros((96, 128, 3), np.uint8)).save(tmp_path / "a.png")
    maps = tmp_path / "heatmaps"
    for name in ("a.png", "below/b.png", "kept/c.png"):
        write_heatmap(maps / name, tmp_path / "a.png", tiles((0, 0, 0.5)), 0.5)
    shutil.copy(tmp_path / "a.png", maps / "kept" / "theirs.png")
    (maps / "theirs.png").symlink_to(tmp_path / "a.png")
    heatmap.remove_heatmaps(maps)
    left = sorted(path.relative_to(maps).as_posix() for path in maps.rglob("*"))
    assert left == ["kept", "kept/theirs.png", "theirs.png"]


# ---- small pictures that are drawn from memory --------------------------------------------------


def write_small_map(file, found, threshold=0.5):
    pixels = np.full((*found.shape, 3), 128, np.uint8)
    heatmap.write_map(file, pixels, found.astype(np.float32), "a.svs", threshold, ("a", "b"))
    return pixels_of(file)


def is_line(drawn):
    return (np.abs(drawn - (0xD5, 0x5E, 0x00)) < 30).all(axis=2)


@pytest.mark.filterwarnings("error")
def test_an_area_in_glass_is_outlined_also_if_all_of_it_is_positive(tmp_path):
    found = np.full((100, 100), np.nan)
    found[20:40, 30:70] = 0.9
    area = np.argwhere(is_line(write_small_map(tmp_path / "a.png", found)))
    # A pixel is drawn about ten pixels wide, because the picture fills ten inches.
    assert np.ptp(area, axis=0) / 10 == pytest.approx((20, 40), abs=1)
    assert not is_line(write_small_map(tmp_path / "a.png", found, threshold=0.95)).any()


@pytest.mark.filterwarnings("error")
def test_a_picture_without_a_map_is_drawn_alone(tmp_path):
    heatmap.write_plain(tmp_path / "a.png", np.full((9, 9, 3), 77, np.uint8), "$a.svs", "no tissue")
    drawn = pixels_of(tmp_path / "a.png")
    assert (drawn == 77).all(axis=2).mean() > 0.7


def test_classes_have_the_colours_in_which_they_are_drawn(tmp_path):
    names = ("a", "b", "c")
    called = np.repeat([0, 1, 2, -1], 10)[None].repeat(40, axis=0)
    heatmap.write_called(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8), called, "a", names)
    drawn = pixels_of(tmp_path / "a.png")
    for colour in heatmap.class_colours(names):
        on_black = 0.6 * np.array(colour)
        assert (np.abs(drawn - on_black) < 3).all(axis=2).mean() > 0.03
    assert len(set(heatmap.class_colours(names))) == 3
    assert len(heatmap.class_colours(list(map(str, range(30))))) == 30


def test_a_map_that_cannot_be_drawn_leaves_the_one_before(tmp_path, monkeypatch):
    write_small_map(tmp_path / "a.png", np.full((9, 9), 0.3))
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, stream, **_):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        write_small_map(tmp_path / "a.png", np.full((9, 9), 0.4))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


# ---- more than two classes ----------------------------------------------------------------------


def test_the_most_certain_square_decides_the_class_of_a_pixel():
    rng = np.random.default_rng(0)
    tiles = ClassTiles(32)
    squares = [
        (y, x, rng.dirichlet(np.ones(5))) for y in range(0, 65, 16) for x in range(0, 49, 16)
    ]
    for y, x, probabilities in squares:
        tiles.add(y, x, probabilities)
    found = tiles.called_classes(98, 80, 1)
    for row in range(98):
        for column in range(80):
            touching = [p for y, x, p in squares if 0 <= row - y < 32 and 0 <= column - x < 32]
            expected = max(touching, key=max).argmax() if touching else -1
            assert found[row, column] == expected
    for number in range(5):
        of_class = [(y, x, np.float32(p[number])) for y, x, p in squares]
        expected = TileProbabilities(32, of_class).to_array(98, 80, 3)
        np.testing.assert_array_equal(tiles.of_class(number).to_array(98, 80, 3), expected)


def write_three_stripes(folder, classes, shape=(96, 160)):
    """Draws a grey picture whose left part is class 0, and its right part the last class."""
    Image.fromarray(np.full((*shape, 3), 128, np.uint8)).save(folder / "grey.png")
    tiles, last = ClassTiles(32), len(classes) - 1
    for y in range(0, shape[0], 32):
        for x in range(0, shape[1], 32):
            probabilities = np.full(len(classes), 0.3 / last)
            probabilities[0 if x < 64 else last] = 0.7
            tiles.add(y, x, probabilities)
    return write_class_maps(folder / "maps", folder / "grey.png", tiles, classes)


@pytest.mark.filterwarnings("error")
def test_each_class_that_some_place_has_gets_a_map(tmp_path):
    names = ["_a/b", "nowhere", "\U0001f52c", "$x$"]
    assert write_three_stripes(tmp_path, names) == ["classes.png", "0__a_b.png", "3__x_.png"]
    drawn = pixels_of(tmp_path / "maps" / "classes.png")
    counts = {}
    for number in (0, 3):
        colour = (
            0.6 * 255 * np.array(matplotlib.colors.to_rgb(heatmap._COLOURS[number])) + 0.4 * 128
        )
        counts[number] = (np.abs(drawn - colour) < 3).all(axis=2).sum()
    assert counts[0] > 10_000
    assert counts[3] / counts[0] == pytest.approx(3 / 2, rel=0.05)  # as the tiles have the classes


def test_of_very_many_classes_there_is_only_the_map_of_classes(tmp_path):
    names = [f"class {i}" for i in range(65)]
    assert write_three_stripes(tmp_path, names) == ["classes.png"]
    assert len(write_three_stripes(tmp_path, names[:64])) == 3


def test_maps_of_classes_are_removed_with_their_folders(tmp_path):
    write_three_stripes(tmp_path, ["a", "b", "c"])
    heatmap.remove_heatmaps(tmp_path / "maps")
    assert not list((tmp_path / "maps").iterdir())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_maps(tmp_path):
    """Each map of 1,600 px holds some 60 MB until its figure is cleared."""
    shape = (1600, 1600)
    pixels = np.zeros((*shape, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "black.png")

    def draw(count):
        tiles = ClassTiles(32)
        for number in range(count):
            probabilities = np.full(64, 0.5 / 63)
            probabilities[number] = 0.5
            tiles.add(32 * number, 0, probabilities)
        classes = [f"class {i}" for i in range(64)]
        assert len(write_class_maps(tmp_path / "maps", tmp_path / "black.png", tiles, classes)) == (
            count + 1
        )

    few, many = (growth_of(lambda count=count: draw(count)) for count in (2, 12))
    assert many - few < 150 << 20
