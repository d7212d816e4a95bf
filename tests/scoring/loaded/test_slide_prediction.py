"""`predict_slide` of a loaded network, compared with `predict` of the same patches."""

import json

import numpy as np
import pytest

import bef_jax
from bef_jax.data.patch import Tiling
from bef_jax.errors import UserError
from bef_jax.export import export
from bef_jax.runtime import sharding
from bef_jax.scoring import scorer
from bef_jax.scoring.loaded import SlidePrediction
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.state import create_state
from tests.slides.array_slide import ArraySlide, score
from tests.slides.slide_files import tissue_pixels, write_flat, write_pyramid


def save(config, workdir):
    state = create_state(config, sharding.replicated(sharding.make_mesh()))
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(0, state, {"config": json.loads(config.to_json_best_effort())}, None)
    checkpoints.close()


@pytest.fixture(scope="module")
def pixels():
    pixels = tissue_pixels(300, 200).copy()
    pixels[64:160, 96:200] = 255
    return pixels


@pytest.fixture
def model(small_config, tmp_path):
    save(small_config(**{"data.mpp": 0.972}), tmp_path / "run")
    return bef_jax.load(tmp_path / "run")


@pytest.fixture
def slide(pixels, tmp_path):
    return write_flat(tmp_path / "slide.svs", pixels, mpp=0.972)


def test_windows_are_scored_as_predict_scores_their_patches(model, slide, pixels):
    padded = np.pad(pixels, ((32, 96), (32, 96), (0, 0)), "reflect")
    for stride in (None, 50):
        found = model.predict_slide(slide, stride=stride)
        step = stride or 32
        assert found.step == (step, step)
        assert found.shape == (-(-200 // step), -(-300 // step))
        assert (found.width, found.height, found.side) == (300, 200, 32)
        assert found.mpp == pytest.approx(0.972)
        places = list(zip(found.x.astype(int), found.y.astype(int), strict=True))
        tiles = np.stack([padded[y : y + 96, x : x + 96] for x, y in places])
        np.testing.assert_allclose(found.probabilities, model.predict(tiles), rtol=1e-5)
        drawn = found.to_map()
        assert drawn.shape == found.shape
        assert drawn.dtype == np.float32
        assert np.isfinite(drawn).sum() == len(places) < drawn.size
        for (x, y), probability in zip(places, found.probabilities, strict=True):
            assert drawn[y // step, x // step] == np.float32(probability)
    assert len(model.predict_slide(slide).x) == 70 - 3 * 3


def test_places_are_in_pixels_of_level_0(model, tmp_path, pixels):
    large = np.kron(pixels, np.ones((4, 4, 1), np.uint8))
    file = write_pyramid(tmp_path / "a.tif", large, mpp=0.5, compression="deflate")
    found = model.predict_slide(file, mpp=0.243)  # instead of what the file says
    assert (found.width, found.height, found.side, found.mpp) == (1200, 800, 128, 0.243)
    assert found.step == (128, 128)
    assert set(found.x) == set(range(0, 1200, 128))
    assert set(found.y) == set(range(0, 800, 128))


def test_a_slide_of_glass_has_no_windows_but_a_map(model, tmp_path):
    file = write_flat(tmp_path / "glass.svs", np.full((80, 70, 3), 255, np.uint8), mpp=0.972)
    found = model.predict_slide(str(file))
    assert isinstance(found, SlidePrediction)
    assert len(found.x) == len(found.y) == len(found.probabilities) == 0
    assert found.to_map().shape == (3, 3)
    assert np.isnan(found.to_map()).all()


def test_the_network_is_compiled_once_for_many_slides(model, tmp_path, monkeypatch):
    made = []
    original = scorer.make_predictor
    monkeypatch.setattr(scorer, "make_predictor", lambda *a: made.append(0) or original(*a))
    for seed in range(2):
        file = write_flat(tmp_path / f"{seed}.svs", tissue_pixels(90, 60, seed), mpp=0.972)
        assert len(model.predict_slide(file).x) == 2 * 3
    assert len(made) == 1


def test_what_cannot_be_scored_is_said_in_one_line(model, slide, pixels, tmp_path):
    plain = write_flat(tmp_path / "plain.svs", pixels)
    with pytest.raises(UserError, match=r"plain.svs: does not say its um .* predict_slide\(.*mpp="):
        model.predict_slide(plain)
    with pytest.raises(UserError, match=r"nowhere.svs: no such file"):
        model.predict_slide(tmp_path / "nowhere.svs")
    with pytest.raises(UserError, match=r"has 3 um per pixel, coarser"):
        model.predict_slide(slide, mpp=3.0)
    for stride in (0, -1, 1.5, True, "32"):
        with pytest.raises(UserError, match=r"stride=.*: give a whole number"):
            model.predict_slide(slide, stride=stride)
    for mpp in (0, -1, np.nan, np.inf):
        with pytest.raises(UserError, match=r"mpp=.*: give micrometres per pixel"):
            model.predict_slide(slide, mpp=mpp)
    for function in (model.predict, model.features, model.gradcam):
        with pytest.raises(UserError, match=r"slide.svs: is a whole slide; give it to predict_s"):
            function(slide)
    model.config.data.mpp = 0.0
    with pytest.raises(UserError, match=r"does not know the um per pixel of its patches"):
        model.predict_slide(slide)


def test_maps_of_several_classes_have_one_plane_each():
    slide = ArraySlide(tissue_pixels(100, 70))
    tiling = Tiling(96, 32, 32)
    grid, windows = score(slide, lambda tile: tile.mean((0, 1)) / 255, tiling, classes=3)
    x, y = grid.corners(windows.rows, windows.columns)
    shape = grid.rows, grid.columns
    found = SlidePrediction(x, y, 32, windows.probabilities, (32, 32), shape, 100, 70, 0.972)
    drawn = found.to_map()
    assert drawn.shape == (3, 3, 4)
    expected = windows.probabilities.reshape(3, 4, 3).astype(np.float32)
    np.testing.assert_array_equal(drawn, expected.transpose(2, 0, 1))


@pytest.mark.slow
def test_an_exported_file_scores_slides_as_its_checkpoint_does(model, slide, tmp_path):
    pytest.importorskip("onnxruntime")
    export.export_checkpoint(model.config, tmp_path, model.checkpoint)
    written, theirs = tmp_path / "export", model.predict_slide(slide)
    for name in ("model.stablehlo", "model.onnx"):
        ours = bef_jax.load(written / name).predict_slide(slide)
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-5)
        np.testing.assert_array_equal([ours.x, ours.y], [theirs.x, theirs.y])
        assert (ours.step, ours.shape, ours.side) == (theirs.step, theirs.shape, theirs.side)
    (written / "export.json").unlink()
    with pytest.raises(UserError, match=r"model.stablehlo: it and export.json beside it don't say"):
        bef_jax.load(written / "model.stablehlo").predict_slide(slide)
