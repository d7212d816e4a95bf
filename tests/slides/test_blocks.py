"""Blocks, compared with the whole picture: their tiles, their tissue, what has failed, threads."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from PIL import Image

from bef_jax.data.patch import Tiling
from bef_jax.errors import UserError
from bef_jax.slides import blocks as module
from bef_jax.slides.blocks import read_block, read_blocks
from bef_jax.slides.tiles import Block, block_rows, make_grid
from tests.slides.array_slide import MPP, TILING, ArraySlide
from tests.slides.slide_files import GLASS


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def sparse(width, height, seed=0):
    """Returns white pixels, of which one in 3,000 is coloured."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    count = max(1, width * height // 3000)
    rng = np.random.default_rng(seed)
    pixels[rng.integers(0, height, count), rng.integers(0, width, count)] = (200, 90, 160)
    return pixels


def all_blocks(grid):
    return [block for row in block_rows(grid) for block in row]


def reflected(array, margin):
    """Returns a picture with its mirror image around it, by NumPy."""
    after = 2 * margin + 300
    return np.pad(array, ((margin, after), (margin, after), (0, 0))[: array.ndim], "reflect")


SIZES = [(1, 1), (95, 97), (33, 32), (64, 1), (1000, 65), (961, 993), (1089, 700)]
TILINGS = [
    TILING, Tiling(96, 96, 96), Tiling(96, 32, 7), Tiling(96, 32, 300), Tiling(96, 2, 32),
    Tiling(512, 32, 32), Tiling(64, 64, 1), Tiling(224, 100, 33),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiling", TILINGS)
def test_tiles_are_cut_from_the_mirrored_picture(size, tiling):
    if tiling.stride < 7 and max(size) > 100:
        pytest.skip("a million tiles")
    pixels = noise(*size)
    margin = (tiling.side - tiling.center) // 2
    whole = reflected(pixels, margin + 512)[512:, 512:]
    slide = ArraySlide(pixels)
    grid, seen = make_grid(slide, tiling, MPP), 0
    for read in read_blocks(slide, grid, all_blocks(grid)):
        assert not read.failed.any()
        for row in read.block.rows:
            for column in read.block.columns:
                y, x = row * tiling.stride, column * tiling.stride
                tile = read.tile(row, column, grid)
                assert np.array_equal(tile, whole[y : y + tiling.side, x : x + tiling.side])
                seen += 1
    assert seen == grid.rows * grid.columns


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiling", [t for t in TILINGS if t.stride > 1])
def test_tissue_is_what_a_windows_own_square_has_inside_the_slide(size, tiling):
    pixels = sparse(*size)
    coloured = np.asarray(Image.fromarray(pixels).convert("HSV"))[..., 1] > 17
    slide = ArraySlide(pixels)
    grid = make_grid(slide, tiling, MPP)
    for read in read_blocks(slide, grid, all_blocks(grid)):
        for i, row in enumerate(read.block.rows):
            for j, column in enumerate(read.block.columns):
                y, x = row * tiling.stride, column * tiling.stride
                square = coloured[y : y + tiling.center, x : x + tiling.center]
                assert read.tissue[i, j] == square.any()


@pytest.mark.parametrize("size", [(1, 1), (95, 97), (961, 993)])
@pytest.mark.parametrize("tiling", [TILING, Tiling(96, 32, 7), Tiling(96, 96, 50)])
def test_a_window_fails_whose_tile_touches_what_cannot_be_decoded(size, tiling):
    bad = sparse(*size, seed=1)[..., 1] < 255
    slide = ArraySlide(np.full((size[1], size[0], 3), 255, np.uint8), failed=bad)
    grid = make_grid(slide, tiling, MPP)
    margin = (tiling.side - tiling.center) // 2
    whole = reflected(bad, margin + 512)[512:, 512:]
    for read in read_blocks(slide, grid, all_blocks(grid)):
        for i, row in enumerate(read.block.rows):
            for j, column in enumerate(read.block.columns):
                y, x = row * tiling.stride, column * tiling.stride
                expected = whole[y : y + tiling.side, x : x + tiling.side].any()
                assert read.failed[i, j] == read.tissue[i, j] == expected


@pytest.mark.parametrize("mpp", [0.9, 0.5, 0.486, 0.25, 0.103])
def test_blocks_join_without_a_seam(mpp):
    """The same pixels, read with other blocks, differ by a grey level at most."""
    slide = ArraySlide(noise(1501, 1203), mpp=mpp)
    tiling = Tiling(96, 32, 16)
    grid = make_grid(slide, tiling, 1.0)
    assert grid.resize != (1.0, 1.0)
    whole = read_block(slide, grid, Block(range(grid.rows), range(grid.columns)))
    for rows, columns in (
        (range(3, 5), range(1, 8)), (range(grid.rows - 1, grid.rows), range(2, grid.columns)),
        (range(1), range(1)), (range(2, grid.rows - 1), range(grid.columns - 2, grid.columns - 1)),
    ):  # fmt: skip
        part = read_block(slide, grid, Block(rows, columns))
        for row in rows:
            for column in columns:
                ours, theirs = (x.tile(row, column, grid).astype(int) for x in (part, whole))
                assert np.abs(ours - theirs).max() <= 1


def test_resampling_is_pillows_of_the_whole_level():
    """With a whole ratio the slide ends with a pixel, so one resize of all of it is the same."""
    pixels = noise(1200, 900)
    slide = ArraySlide(pixels, mpp=1 / 3)
    grid = make_grid(slide, TILING, 1.0)
    expected = np.asarray(Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC))
    assert (grid.width, grid.height) == (400, 300)
    for read in read_blocks(slide, grid, all_blocks(grid)):
        top, left = read.block.rows.start * 32, read.block.columns.start * 32
        inner = read.pixels[32:, 32:][: 300 - top, : 400 - left].astype(int)
        wrong = np.abs(inner - expected[top : top + inner.shape[0], left : left + inner.shape[1]])
        # At the edge Pillow cuts its filter, and we repeat the last pixel.
        assert wrong[2:-2, 2:-2].max() <= 1


@pytest.mark.parametrize("mpp", [0.5, 0.3])
def test_a_window_fails_if_a_resampled_pixel_depends_on_what_cannot_be_decoded(mpp):
    """Whether a pixel has an influence is found by changing it."""
    pixels = np.full((300, 420, 3), 128, np.uint8)
    bad = np.zeros((300, 420), bool)
    bad[130, 201] = True
    changed = pixels.copy()
    changed[bad] = 255
    slides = [ArraySlide(each, mpp=mpp, failed=bad) for each in (pixels, changed)]
    tiling = Tiling(8, 8, 1)
    grid = make_grid(slides[0], tiling, 1.0)
    plain, other = (read_block(each, grid, all_blocks(grid)[0]) for each in slides)
    influenced = (plain.pixels != other.pixels).any(axis=2)
    windows = np.lib.stride_tricks.sliding_window_view(influenced, (8, 8)).any((2, 3))
    assert windows.any()
    assert not np.any(windows & ~plain.failed)
    # A filter's coefficient at its end is too small to change a grey level.
    reach = np.lib.stride_tricks.sliding_window_view(influenced, (12, 12)).any((2, 3))
    assert not np.any(plain.failed[2:-2, 2:-2] & ~reach)


def test_glass_has_no_tissue():
    slide = ArraySlide(np.full((400, 400, 3), GLASS, np.uint8))
    grid = make_grid(slide, TILING, MPP)
    assert not any(read.tissue.any() for read in read_blocks(slide, grid, all_blocks(grid)))


# ---- threads ------------------------------------------------------------------------------------


class SlowSlide(ArraySlide):
    """A slide whose blocks take a while, the first ones most, and of which one can't be read."""

    def __init__(self, *levels, broken=None):
        super().__init__(*levels)
        self.broken, self.reads, self._lock = broken, 0, threading.Lock()

    def read(self, level, x, y, width, height):
        with self._lock:
            self.reads += 1
            number = self.reads
        time.sleep(0.02 / number)
        if self.broken is not None and x <= self.broken < x + width:
            raise UserError("painted.svs: can no longer be opened")
        return super().read(level, x, y, width, height)


def slide_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("slide")]


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: request.param)
    return request.param


def long_slide(**fields):
    slide = SlowSlide(np.broadcast_to(np.uint8(255), (40, 20_000, 3)), **fields)
    grid = make_grid(slide, TILING, MPP)
    return slide, grid, all_blocks(grid)


def test_blocks_keep_their_order(threads):
    slide, grid, blocks = long_slide()
    waits = []
    found = [read.block for read in read_blocks(slide, grid, blocks, waits.append)]
    assert found == blocks
    assert len(blocks) > 20
    assert len(waits) == len(blocks)
    assert 0 < sum(waits) < 10
    assert not slide_threads()


def test_memory_holds_two_blocks_for_each_thread(threads):
    slide, grid, blocks = long_slide()
    alive = weakref.WeakSet()
    most = 0
    original = module.read_block

    def noted(*args):
        read = original(*args)
        alive.add(read)
        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_block", noted)
        for read in read_blocks(slide, grid, blocks):
            time.sleep(0.005)
            most = max(most, len(alive))
            del read
    gc.collect()
    assert 1 < most <= 2 * threads


def test_an_error_comes_at_its_place_and_ends_the_threads(threads):
    slide, grid, blocks = long_slide(broken=9700)
    found = []
    with pytest.raises(UserError, match=r"painted.svs: can no longer be opened"):
        found.extend(read.block for read in read_blocks(slide, grid, blocks))
    assert found == blocks[:10]
    assert not slide_threads()
    assert slide.reads < len(blocks)


def test_closing_early_ends_the_threads(threads):
    slide, grid, blocks = long_slide()
    reads = read_blocks(slide, grid, blocks)
    next(reads)
    reads.close()
    assert not slide_threads()
    assert slide.reads <= 2 * threads


def test_blocks_are_asked_for_only_when_they_are_read(threads):
    slide, grid, blocks = long_slide()
    asked = []

    def noted():
        for block in blocks:
            asked.append(block)
            yield block

    reads = read_blocks(slide, grid, noted())
    assert not asked
    next(reads)
    assert len(asked) == 2 * threads
    reads.close()
