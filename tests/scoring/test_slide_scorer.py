"""Scored windows of slides: order, batches, failed tiles, scores that are not finite, devices."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bef_jax.errors import RunError
from bef_jax.runtime import sharding
from bef_jax.scoring import scorer
from bef_jax.scoring.slide_scorer import for_slides, score_row, score_rows
from bef_jax.slides.tiles import block_rows, make_grid
from tests.conftest import environment_of
from tests.slides.array_slide import MPP, TILING, ArraySlide
from tests.slides.slide_files import tissue_pixels


def means(tiles, size=64):
    """Predicts the mean of each tile, in batches."""
    for batch in scorer.in_batches(tiles, size):
        yield np.stack(batch).mean((1, 2, 3)) / 255


@pytest.fixture
def slide():
    pixels = tissue_pixels(1500, 1100).copy()
    pixels[200:420, 100:700] = 255
    failed = np.zeros(pixels.shape[:2], bool)
    failed[700:705, 300:330] = True
    return ArraySlide(pixels, failed=failed)


def test_windows_are_in_order_and_those_that_failed_are_nan(slide):
    grid = make_grid(slide, TILING, MPP)
    rows = list(block_rows(grid))
    found = [score_row(means, slide, grid, blocks) for blocks in rows]
    assert len(found) == len(rows) == 2
    for blocks, windows in zip(rows, found, strict=True):
        places = windows.rows.astype(int) * grid.columns + windows.columns
        assert np.all(np.diff(places) > 0)
        assert set(windows.rows.tolist()) <= set(blocks[0].rows)
        dtypes = windows.rows.dtype, windows.columns.dtype, windows.probabilities.dtype
        assert dtypes == (np.int32, np.int32, np.float64)
    rows, columns, probabilities = (
        np.concatenate([getattr(each, name) for each in found])
        for name in ("rows", "columns", "probabilities")
    )
    # Tiles begin 32 px before their windows, and end 64 px after their beginning.
    touched = (
        (rows * 32 - 32 < 705) & (rows * 32 + 64 > 700)
        & (columns * 32 - 32 < 330) & (columns * 32 + 64 > 300)
    )  # fmt: skip
    assert np.array_equal(np.isnan(probabilities), touched)
    assert touched.sum() == 4 * 4
    glass = (rows >= 7) & (rows < 13) & (columns >= 4) & (columns < 21)
    assert not glass.any()
    assert len(rows) == grid.rows * grid.columns - 6 * 17
    padded = np.pad(slide.arrays[0], ((32, 96), (32, 96), (0, 0)), "reflect")
    for row, column, found in zip(rows, columns, probabilities, strict=True):
        tile = padded[row * 32 : row * 32 + 96, column * 32 : column * 32 + 96]
        assert np.isnan(found) or found == pytest.approx(tile.mean() / 255)


def test_rows_scored_together_or_alone_are_the_same(slide):
    grid = make_grid(slide, TILING, MPP)
    waits = []
    together = list(score_rows(means, slide, grid, block_rows(grid), wait=waits.append))
    alone = [score_row(means, slide, grid, blocks) for blocks in block_rows(grid)]
    assert len(together) == len(alone)
    for ours, theirs in zip(together, alone, strict=True):
        for name in ("rows", "columns", "probabilities"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert len(waits) == sum(map(len, block_rows(grid)))


def test_a_slide_of_glass_has_no_windows():
    slide = ArraySlide(np.full((300, 1200, 3), 255, np.uint8))
    grid = make_grid(slide, TILING, MPP)
    for classes, shape in ((2, (0,)), (5, (0, 5))):
        (windows,) = score_rows(means, slide, grid, block_rows(grid), classes)
        assert windows.rows.shape == (0,)
        assert windows.probabilities.shape == shape


def test_failed_windows_of_several_classes_are_rows_of_nan(slide):
    def predict(tiles):
        for batch in means(tiles):
            yield np.stack([batch, 1 - batch, batch * 0], axis=1)

    grid = make_grid(slide, TILING, MPP)
    (windows, _) = score_rows(predict, slide, grid, block_rows(grid), classes=3)
    assert windows.probabilities.shape == (len(windows.rows), 3)
    bad = np.isnan(windows.probabilities)
    assert bad.any()
    assert np.array_equal(bad.any(axis=1), bad.all(axis=1))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_score_that_is_not_finite_names_the_slide_and_the_window(slide, classes):
    def predict(tiles):
        for batch in means(tiles):
            batch = np.stack([batch] * 3, axis=1) if classes == 3 else batch
            batch[0, ...] = np.nan
            yield batch

    slide.mpp = MPP * 2 / 3
    grid = make_grid(slide, TILING, MPP)
    with pytest.raises(RunError, match=r"no finite score for patch painted.svs:x=0:y=0: the netw"):
        list(score_rows(predict, slide, grid, block_rows(grid), classes))
    rows = list(block_rows(grid))
    slide.arrays[0][:2] = 255
    slide.arrays[0][:, :100] = 255
    with pytest.raises(RunError, match=r"painted.svs:x=96:y=0:"):
        list(score_rows(predict, slide, grid, rows, classes))


def test_tiles_are_taken_lazily(slide, monkeypatch):
    """The first batch is computed before the last block of a row is read."""
    pixels = tissue_pixels(20_000, 40)
    slide = ArraySlide(pixels)
    grid = make_grid(slide, TILING, MPP)
    reads, at_batches = [], []
    read = ArraySlide.read
    monkeypatch.setattr(ArraySlide, "read", lambda *args: reads.append(0) or read(*args))

    def predict(tiles):
        for batch in means(tiles):
            at_batches.append(len(reads))
            yield batch

    list(score_rows(predict, slide, grid, block_rows(grid)))
    assert at_batches[0] <= 10 < len(reads) == 21


def test_batches_are_padded_to_two_sizes(small_config):
    config, mesh = small_config(**{"eval.batch_size": 64}), sharding.make_mesh()
    shapes = []

    def score(images):
        shapes.append(len(images))
        return [np.asarray(images, np.float32).mean((1, 2, 3)) / 255]

    def predict(patches, sizes=()):
        found = scorer.map_patches(score, patches, 64, mesh, sizes)
        return map(scorer.mean_probabilities, found)

    predict = for_slides(predict, config, mesh)
    for count in (1, 8, 9, 63, 64, 65, 73, 200):
        tiles = np.full((count, 96, 96, 3), 100, np.uint8)
        assert np.concatenate(list(predict(iter(tiles)))).shape == (count,)
    assert shapes == [8, 8, 64, 64, 64, 64, 8, 64, 64, 64, 64, 64, 8]
    assert scorer.two_sizes(64, mesh) == (8, 64)
    assert scorer.two_sizes(1, mesh) == (1, 1)


# Prints the probabilities of the windows of a slide, and how many rows each device has of batches.
SCORE = """
import json, sys
import jax, numpy as np
from bef_jax.configs import quickstart
from bef_jax.runtime import sharding
from bef_jax.scoring import scorer
from bef_jax.scoring.slide_scorer import for_slides, score_rows
from bef_jax.slides.tiles import block_rows, make_grid
from bef_jax.training.state import create_state
from tests.slides.array_slide import MPP, TILING, ArraySlide
from tests.slides.slide_files import tissue_pixels

map_patches, shapes = scorer.map_patches, []

def map_and_note(function, *rest):
    def noted(images):
        shapes.append([len(shard.data) for shard in images.addressable_shards])
        return function(images)
    return map_patches(noted, *rest)

scorer.map_patches = map_and_note
config = quickstart.get_config()
config.eval.batch_size = 60
mesh = sharding.make_mesh()
variables = create_state(config, sharding.replicated(mesh)).eval_variables()
by_jax = scorer.make_scorer(config, mesh)(variables)
predict = for_slides(scorer.make_predictor(config, by_jax, mesh), config, mesh)
slide = ArraySlide(tissue_pixels(400, 160))
grid = make_grid(slide, TILING, MPP)
(windows,) = score_rows(predict, slide, grid, block_rows(grid))
print(json.dumps([windows.probabilities.tolist(), shapes]))
"""


@pytest.mark.slow
def test_eight_devices_score_a_slide_as_one_does():
    def run(devices):
        command = [sys.executable, "-c", SCORE]
        done = subprocess.run(command, env=environment_of(devices), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    (expected, alone), (found, shapes) = run(1), run(8)
    assert len(expected) == 13 * 5
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert alone == [[60], [8]]
    assert shapes == [[8] * 8, [1] * 8]
