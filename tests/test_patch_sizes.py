"""A network of 64 px patches whose whole area decides: from arrays to a run, scores and files."""

import json

import numpy as np
import pytest
from PIL import Image

import bef_jax
from bef_jax import predict, train
from bef_jax.errors import UserError
from bef_jax.export import export
from bef_jax.scoring import trained
from bef_jax.training import checkpoint

pytestmark = pytest.mark.slow

SIDE = 64
FIELDS = {
    "data.source": "npz",
    "data.patch_size": SIDE,
    "rcc.center": 0,
    "rcc.min_size": 20,
    "rcc.max_size": SIDE,
    "rcc.eval_size": SIDE,
    "data.train_size": 24,
    "model.total_stride": 32,
    "checkpoint.every_steps": 100,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a split of random patches in each of three files."""
    folder, rng = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    for split, n in (("train", 24), ("valid", 10), ("test", 6)):
        images = rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(n) % 2)
    return folder


@pytest.fixture
def run(folder, small_config):
    """Returns the folder of a run of three steps, which the first test trains."""
    workdir = folder / "run"
    if not workdir.exists():
        config = small_config(steps=3, **FIELDS | {"data.dir": str(folder)})
        train.train_and_evaluate(config, workdir)
    return workdir


@pytest.fixture
def images(folder):
    return np.load(folder / "test.npz")["images"]


def test_a_run_reports_its_losses_and_scores(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= 3 and np.isfinite(losses).all()
    summary = json.loads((run / "train_summary.json").read_text())
    assert (summary["step"], summary["valid"]["n"], summary["test"]["n"]) == (3, 10, 6)
    page = (run / "report" / "index.html").read_text()
    assert "The most confident patches" in page and "square" not in page


def test_a_picture_is_cut_into_whole_patches(run, images, tmp_path):
    model, best = bef_jax.load(run), checkpoint.best(run)
    expected = model.predict(images[:2])
    Image.fromarray(np.concatenate(images[:2], axis=1)).save(tmp_path / "two.png")
    np.testing.assert_allclose(model.predict(tmp_path / "two.png"), expected, rtol=1e-5)
    config = trained.scoring_config(best)
    summary = predict.predict_files(config, tmp_path / "out", best, tmp_path / "two.png")
    assert (summary["n"], len(summary["heatmaps"])) == (2, 1)
    assert model.gradcam(images).shape == (6, SIDE, SIDE)
    with pytest.raises(UserError, match=r"give uint8 \[N, 64, 64, 3\]"):
        model.predict(np.zeros((1, 96, 96, 3), np.uint8))


def test_exported_files_score_as_the_run(run, images, tmp_path):
    pytest.importorskip("onnxruntime")
    best = checkpoint.best(run)
    summary = export.export_checkpoint(trained.scoring_config(best), tmp_path, best)
    assert (summary["input"]["shape"], summary["center"]) == (["n", SIDE, SIDE, 3], 0)
    expected = bef_jax.load(run).predict(images)
    Image.fromarray(np.concatenate(images[:3], axis=0)).save(tmp_path / "three.png")
    for name in ("model.stablehlo", "model.onnx"):
        model = bef_jax.load(tmp_path / "export" / name)
        np.testing.assert_allclose(model.predict(images), expected, atol=1e-5)
        np.testing.assert_allclose(model.predict(tmp_path / "three.png"), expected[:3], atol=1e-5)
