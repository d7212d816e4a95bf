"""Where windows lie: each tile of a painted slide shows, in its middle, where it was read."""

import numpy as np
import pytest

from bef_jax.data.patch import Tiling
from bef_jax.errors import UserError
from bef_jax.slides.reader import open_slide
from bef_jax.slides.tiles import block_rows, make_grid
from tests.slides.array_slide import MPP, TILING, ArraySlide, score, write_levels

NEAR = 6  # pixels around a tile's middle whose mean is taken


def painted(places, length, period):
    """Returns colours that tell where pixels of level 0 are, along one axis, uint8 [..., 3].

    Red tells roughly. The phase of a wave, which no symmetric filter shifts, tells exactly.
    """
    angle = 2 * np.pi * places / period
    waves = [127.5 + 110 * np.sin(angle), 127.5 + 110 * np.cos(angle)]
    return np.rint(np.stack([20 + 215 * places / length, *waves], axis=-1)).astype(np.uint8)


def place_of(colours, length, period):
    """Returns the places that mean colours tell, [N]."""
    red, sine, cosine = colours.T
    phase = np.arctan2(sine - 127.5, cosine - 127.5) / (2 * np.pi) * period
    return phase + period * np.rint(((red - 20) / 215 * length - phase) / period)


def level_of(size, size0, axis, period):
    """Returns a level that is painted along x (axis 0) or y (1), uint8 [H, W, 3]."""
    places = (np.arange(size[axis]) + 0.5) * size0[axis] / size[axis]
    colours = painted(places, size0[axis], period)
    line = colours[None] if axis == 0 else colours[:, None]
    return np.broadcast_to(line, (size[1], size[0], 3))


def middle(tile):
    half = tile.shape[0] // 2
    return tile[half - NEAR : half + NEAR, half - NEAR : half + NEAR].mean((0, 1))


def check_places(slide, size0, axis, period, tiling=TILING):
    """Checks that each window lies where its tile shows, to a pixel of level 0."""
    grid, found = score(slide, middle, tiling, classes=3)
    assert len(found.rows) == grid.rows * grid.columns  # all of it is coloured
    corners = grid.corners(found.rows, found.columns)
    centers = np.stack(corners) + np.array(grid.scale)[:, None] * tiling.center / 2
    near = NEAR * np.array(grid.scale)[:, None]
    # The mirror image beyond an edge tells other places.
    whole = ((centers >= near) & (centers <= np.array(size0)[:, None] - near)).all(axis=0)
    told = place_of(found.probabilities[whole], size0[axis], period)
    wrong = np.abs(told - centers[axis][whole])
    assert whole.sum() > 4
    assert wrong.max() <= 1.0, wrong.max()


# Sizes of level 0 and of the level that is read, and the scale of level 0.
PYRAMIDS = {
    "2": ((2402, 1802), (1201, 901), 0.5),
    "2.0005": ((4001, 603), (2000, 301), 0.486),
    "4.016": ((2409, 2009), (600, 500), 0.25),
    "4.016, resampled": ((2409, 2009), (600, 500), 0.2),
    "64.1": ((96_150, 6_410), (1500, 100), 0.0152),
    "64.1, odd": ((96_211, 6_473), (1500, 100), 0.0152),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_each_window_lies_where_its_tile_was_read(name, axis):
    size0, size, mpp = PYRAMIDS[name]
    period = 48 * size0[0] / size[0]
    level = level_of(size, size0, axis, period)
    check_places(ArraySlide(level, mpp=mpp, size=size0), size0, axis, period)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_each_window_of_a_file_lies_where_its_tile_was_read(name, axis, tmp_path):
    pytest.importorskip("openslide")
    size0, size, mpp = PYRAMIDS[name]
    period = 48 * size0[0] / size[0]
    level = level_of(size, size0, axis, period)
    # Level 0 is not read, so it is white.
    file = write_levels(tmp_path / "slide.tif", [size0, level], mpp)
    with open_slide(file, mpp) as slide:
        assert make_grid(slide, TILING, MPP).level == 1
        check_places(slide, size0, axis, period)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mpp", [0.972, 0.499, 0.25, 0.11])
@pytest.mark.parametrize(
    "tiling", [Tiling(96, 32, 32), Tiling(96, 96, 41), Tiling(224, 32, 150), Tiling(64, 2, 300)]
)
def test_a_single_level_is_resampled_to_the_same_places(tiling, mpp, axis):
    scale = 0.972 / mpp
    size = round(1003 * scale), round(701 * scale)
    period = 48 * scale
    check_places(
        ArraySlide(level_of(size, size, axis, period), mpp=mpp), size, axis, period, tiling
    )


# ---- coverage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (95, 97), (96, 96), (961, 993), (1500, 33)])
@pytest.mark.parametrize("mpp", [0.972, 0.4])
def test_each_square_of_tissue_is_decided_once(size, mpp):
    """Counted in pixels of the network's scale, by the corners in pixels of level 0."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    rng = np.random.default_rng(0)
    spots = rng.integers(0, size[0], 20), rng.integers(0, size[1], 20)
    for x, y in zip(*spots, strict=True):
        pixels[y : y + 40, x : x + 25] = (200, 90, 160)
    grid, found = score(ArraySlide(pixels, mpp=mpp), np.mean)
    counts = np.zeros((grid.height + 32, grid.width + 32), int)
    for x, y in zip(*grid.corners(found.rows, found.columns), strict=True):
        left, top = round(x / grid.scale[0]), round(y / grid.scale[1])
        counts[top : top + 32, left : left + 32] += 1
    assert counts.max() == 1
    # Each coloured pixel of level 0 lies in a square that was decided.
    y, x = np.nonzero(pixels[..., 1] < 255)
    inside = np.minimum(
        [y / grid.scale[1], x / grid.scale[0]], [[grid.height - 1], [grid.width - 1]]
    )
    assert counts[tuple(inside.astype(int))].min() == 1


@pytest.mark.parametrize("stride", [1, 7, 31, 32, 33, 96, 300])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 95, 961])
def test_windows_begin_inside_and_reach_the_end(stride, length):
    grid = make_grid(ArraySlide(np.zeros((3, length, 3), np.uint8)), Tiling(96, 32, stride), MPP)
    last = (grid.columns - 1) * stride
    assert last < length
    assert last + max(32, stride) >= length
    # A window more would decide nothing that is new.
    assert grid.columns == 1 or last - stride + max(32, stride) < length


def test_blocks_hold_each_window_once():
    slide = ArraySlide(np.broadcast_to(np.uint8(0), (2000, 3100, 3)))
    for stride in (1, 32, 300, 5000):
        grid = make_grid(slide, Tiling(96, 32, stride), MPP)
        counts = np.zeros((grid.rows, grid.columns), int)
        for row in block_rows(grid):
            assert len({block.rows for block in row}) == 1
            for rows, columns in row:
                counts[rows.start : rows.stop, columns.start : columns.stop] += 1
        assert counts.min() == counts.max() == 1


def tumour_at(x, y):
    """Returns which places, in micrometres, lie in one of two blobs; and their distance to it."""
    first = np.hypot(x - 900, y - 700) - 400
    second = np.hypot(x - 1900, (y - 1500) * 1.5) - 300
    distance = np.minimum(first, second)
    return distance < 0, np.abs(distance)


@pytest.mark.parametrize("scales", [(0.25, (1, 2, 4, 16)), (0.226, (1, 4.016)), (0.5, (1, 2.0005))])
def test_slides_of_any_scale_give_the_same_classes(scales):
    mpp, downsamples = scales
    size = round(2400 / mpp), round(2000 / mpp)
    levels = []
    for downsample in downsamples[1:]:
        width, height = (int(each / downsample) for each in size)
        x, y = (
            (np.arange(n) + 0.5) * m / n * mpp for n, m in zip((width, height), size, strict=True)
        )
        is_tumour = tumour_at(x[None], y[:, None])[0][..., None]
        levels.append(np.where(is_tumour, np.uint8([120, 40, 120]), np.uint8([230, 150, 200])))
    slide = ArraySlide(*levels, mpp=mpp, size=size)
    grid, found = score(slide, lambda tile: tile[32:64, 32:64, 0].mean() < 175)
    x, y = (each * mpp for each in grid.corners(found.rows, found.columns))
    side = grid.side * mpp
    is_tumour, distance = tumour_at(x + side / 2, y + side / 2)
    # The distance to the ellipse is stretched by at most 1.5.
    clear = distance > 1.5 * side
    assert clear.mean() > 0.5
    assert np.array_equal(found.probabilities[clear] == 1, is_tumour[clear])
    assert is_tumour[clear].sum() > 100


# ---- levels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mpp", "level", "ratio"),
    [
        (0.25, 2, 1), (0.226, 2, 1), (0.2251, 2, 1), (0.2249, 2, 0.972 / 0.8996), (0.262, 2, 1),
        (0.263, 1, 0.972 / 0.526), (0.5, 1, 1), (1.0, 0, 1), (0.91, 0, 1), (0.7, 0, 0.972 / 0.7),
        (0.243, 2, 1), (1.04, 0, 1), (0.05, 3, 0.972 / 0.8),
    ],
)  # fmt: skip
def test_the_level_nearest_to_the_networks_scale_is_read(mpp, level, ratio):
    sizes = [(6400, 3200), (3200, 1600), (1600, 800), (400, 200)]
    arrays = [np.broadcast_to(np.uint8(0), (h, w, 3)) for w, h in sizes]
    grid = make_grid(ArraySlide(*arrays, mpp=mpp), TILING, MPP)
    assert (grid.level, grid.resize) == (level, pytest.approx((ratio, ratio)))
    factor = sizes[0][0] / sizes[level][0]
    assert grid.scale == pytest.approx((factor * ratio, factor * ratio))
    assert grid.mpp == pytest.approx(mpp * factor * ratio)
    assert (grid.width - 1) * ratio < sizes[level][0] <= grid.width * ratio + 1e-5


def test_slides_that_do_not_fit_are_refused_in_one_line():
    slide = ArraySlide(np.zeros((10, 10, 3), np.uint8), mpp=1.1)
    with pytest.raises(UserError, match=r"painted.svs: has 1.1 um per pixel, coarser .* 0.972"):
        make_grid(slide, TILING, MPP)
    slide.mpp = None
    with pytest.raises(UserError, match=r"does not say its um per pixel; give --config.slides"):
        make_grid(slide, TILING, MPP)
    slide.mpp = 0.001
    with pytest.raises(UserError, match=r"each tile would take 93,312 pixels in each direction"):
        make_grid(slide, TILING, MPP)


def test_a_block_stays_small_however_fine_its_level_is():
    slide = ArraySlide(np.broadcast_to(np.uint8(0), (40_000, 30_000, 3)), mpp=0.02)
    grid = make_grid(slide, TILING, MPP)
    assert grid.block * 32 * grid.resize[0] <= 2048
    assert len(list(block_rows(grid))) == -(-grid.rows // grid.block)
