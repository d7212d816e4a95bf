"""Compares predictions for stores, pictures and arrays with the scores of an evaluation."""

import csv
import json
import os
import shutil
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

import bef_jax
from bef_jax import evaluate, predict
from bef_jax.configs import quickstart
from bef_jax.data import store
from bef_jax.errors import RunError, UserError
from bef_jax.runtime import lock, sharding
from bef_jax.scoring import heatmap, trained
from bef_jax.scoring.evaluator import make_evaluator
from bef_jax.training import checkpoint
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.state import abstract_state, create_state
from tests.conftest import SHRUNK


def rows_of(workdir):
    with open(workdir / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.smoke
@pytest.mark.parametrize("tta", [1, 8])
def test_a_store_gets_the_scores_of_an_evaluation(tta, run_summary, workdir, scoring):
    changes = {"eval.tta": tta, "eval.batch_size": 5, "eval.threshold": 0.499}
    config, best = scoring(**changes)
    path = store.store_path(config.data)
    summary = predict.predict_files(config, workdir, best, path, "valid")
    rows = rows_of(workdir)
    split = store.open_split(path, "valid")
    assert [row["id"] for row in rows] == split.ids.tolist()
    found = np.array([float(row["probability"]) for row in rows])
    mesh = sharding.make_mesh()
    variables = checkpoint.restore_variables(best, config, sharding.replicated(mesh))
    expected = make_evaluator(config, mesh)(variables, split).probabilities
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    block = evaluate.evaluate_checkpoint(config, best, "valid")
    assert np.mean((found >= 0.499) == split.labels) == pytest.approx(block["accuracy"])
    assert [int(row["decision"]) for row in rows] == (found >= 0.499).astype(int).tolist()
    assert (summary["n"], summary["positives"]) == (21, int((found >= 0.499).sum()))
    assert summary["heatmaps"] == []


def test_files_get_the_scores_of_the_same_pixels_in_a_store(
    run_summary, workdir, scoring, tmp_path
):
    config, best = scoring()
    path = store.store_path(config.data)
    split = store.open_split(path, "test")
    predict.predict_files(config, workdir, best, path, "test")
    expected = [row["probability"] for row in rows_of(workdir)]
    for number, image in enumerate(split.images):
        Image.fromarray(image).save(tmp_path / f"{number:02d}, \u00e4.png")
    predict.predict_files(config, workdir, best, tmp_path)
    assert [row["probability"] for row in rows_of(workdir)] == expected
    assert rows_of(workdir)[3]["id"] == "03, \u00e4.png"


def test_a_larger_picture_is_tiled_and_drawn(run_summary, workdir, scoring, tmp_path):
    config, best = scoring(**{"predict.stride": 16})
    split = store.open_split(store.store_path(config.data), "test")
    Image.fromarray(np.concatenate(split.images[:2], axis=1)).save(tmp_path / "two.png")
    summary = predict.predict_files(config, workdir, best, tmp_path / "two.png")
    (file,) = summary["heatmaps"]
    assert file == str(workdir / "heatmaps" / "two.png")
    assert min(Image.open(file).size) > 200
    rows = {row["id"]: float(row["probability"]) for row in rows_of(workdir)}
    assert len(rows) == summary["n"] == 5 * 11
    predict.predict_files(config, workdir, best, store.store_path(config.data), "test")
    alone = [float(row["probability"]) for row in rows_of(workdir)]
    # The windows around the squares at (32, 32) and (32, 128) are the two patches.
    assert rows["two.png:x=32:y=32"] == pytest.approx(alone[0], rel=1e-5)
    assert rows["two.png:x=128:y=32"] == pytest.approx(alone[1], rel=1e-5)
    # The old map is deleted, because the predictions are of another input now.
    assert not list((workdir / "heatmaps").rglob("*.png"))


def test_a_damaged_array_leaves_the_earlier_predictions(run_summary, workdir, scoring, tmp_path):
    config, best = scoring()
    predict.predict_files(config, workdir, best, store.store_path(config.data), "test")
    before = (workdir / "predictions.csv").read_bytes()
    images = np.zeros((20, 96, 96, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz"):
        predict.predict_files(config, workdir, best, tmp_path / "a.npz")
    assert (workdir / "predictions.csv").read_bytes() == before
    assert not (workdir / ".predict.tmp").exists()


def test_bad_pictures_do_not_cost_the_good_ones(run_summary, workdir, scoring, tmp_path):
    config, best = scoring()
    image = store.open_split(store.store_path(config.data), "test").images[0]
    for name in ("a.png", "cut.jpg", "z.png"):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1500])
    Image.new("RGB", (95, 96)).save(tmp_path / "small.png")
    os.mkfifo(tmp_path / "fifo.tif")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere")
    summary = predict.predict_files(config, workdir, best, tmp_path)
    assert [row["id"] for row in rows_of(workdir)] == ["a.png", "z.png"]
    assert summary["n"] == 2
    reasons = {each["file"]: each["reason"] for each in summary["unreadable"]}
    for name, words in {
        "cut.jpg": "truncated", "small.png": "95x96 pixels", "fifo.tif": "is a FIFO",
        "zero.png": "is a device", "gone.png": "No such file",
    }.items():  # fmt: skip
        assert words in reasons.pop(name)
    assert not reasons


def test_bad_pictures_alone_leave_the_earlier_predictions(run_summary, workdir, scoring, tmp_path):
    config, best = scoring()
    predict.predict_files(config, workdir, best, store.store_path(config.data), "test")
    before = (workdir / "predictions.csv").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    content = bytearray((tmp_path / "cut.png").read_bytes())
    content[len(content) // 2] ^= 255  # the header is good, the pixels are not
    (tmp_path / "cut.png").write_bytes(content)
    for _ in range(2):  # the second time with a FIFO beside it
        with pytest.raises(UserError, match=r"cut\.png"):
            predict.predict_files(config, workdir, best, tmp_path)
        os.mkfifo(tmp_path / "fifo.png")
        (tmp_path / "fifo.png").rename(tmp_path / "z.png")
    assert (workdir / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(value, run_summary, workdir, scoring, tmp_path):
    """Infinite log-odds would give the probability 1, and NaN would be below any threshold."""
    config, best = scoring()
    path = store.store_path(config.data)
    predict.predict_files(config, workdir, best, path, "test")
    before = (workdir / "predictions.csv").read_bytes()
    spoiled = spoil(best, config, tmp_path / "weights", value)
    with pytest.raises(RunError, match="no finite score for patch synthetic_test_0:"):
        predict.predict_files(config, workdir, spoiled, path, "test")
    assert (workdir / "predictions.csv").read_bytes() == before
    with pytest.raises(RunError, match="no finite score for patch synthetic_test_0:"):
        evaluate.evaluate_checkpoint(config, spoiled, "test")
    with pytest.raises(RunError, match="no finite score for patch 0:"):
        bef_jax.load(spoiled).predict(np.zeros((2, 96, 96, 3), np.uint8))


def spoil(best, config, folder, value):
    """Returns a copy of a checkpoint whose bias for class 1 is `value`."""
    everywhere = sharding.replicated(sharding.make_mesh())
    state = checkpoint.restore(best, abstract_state(config), everywhere)
    run = checkpoint.read_metadata(best)
    bias = state.ema["params"]["classifier"]["bias"]
    state.ema["params"]["classifier"]["bias"] = bias.at[1].set(value)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, state, run, auc=0.5)
    checkpoints.close()
    return checkpoint.best(folder)


def test_a_second_prediction_in_the_same_workdir_is_refused(run_summary, workdir, scoring):
    config, best = scoring()
    path = store.store_path(config.data)
    refused = pytest.raises(UserError, match="another run writes there")
    with lock.held(workdir, ".predict.lock"), refused:
        predict.predict_files(config, workdir, best, path, "test")
    with lock.held(workdir):  # as a training run does
        assert predict.predict_files(config, workdir, best, path, "test")["n"] == 13


def test_outputs_that_cannot_be_written_are_found_before_the_work(small_config, tmp_path):
    """There is no checkpoint, so the outputs must have been checked first."""
    (tmp_path / "a.png").mkdir()
    for name, make in (("predictions.csv", os.mkdir), ("heatmaps", os.mkfifo)):
        workdir = tmp_path / name / "run"
        workdir.mkdir(parents=True)
        make(workdir / name)
        with pytest.raises(UserError, match=f"{name}: is in .* file;|{name}: is in .* folder;"):
            predict.predict_files(small_config(), workdir, tmp_path, tmp_path)


# ---- more than two classes ----------------------------------------------------------------------

CLASSES = ("=fat", "a/b", "\U0001f52c\n")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Returns the workdir of a checkpoint of three classes, with random weights."""
    config = quickstart.get_config()
    config.update_from_flattened_dict(
        SHRUNK | {"model.num_classes": 3, "data.classes": CLASSES, "predict.stride": 32}
    )
    folder = tmp_path_factory.mktemp("three")
    state = create_state(config, sharding.replicated(sharding.make_mesh()))
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(0, state, {"config": json.loads(config.to_json_best_effort())}, None)
    checkpoints.close()
    return folder


def predict_three(folder, path):
    best = trained.find(folder)
    return predict.predict_files(trained.scoring_config(best), folder, best, path)


def test_three_classes_have_a_column_each(three, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 96, 96, 3), dtype=np.uint8)
    np.savez(tmp_path / "patches.npz", images=images)
    summary = predict_three(three, tmp_path / "patches.npz")
    expected = bef_jax.load(three).predict(images)
    with open(three / "predictions.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    columns = ["probability_=fat", "probability_a/b", "probability_\U0001f52c\\n"]
    assert head == ["id", "decision", *columns]
    assert [list(map(float, row[2:])) for row in rows] == expected.tolist()
    called = expected.argmax(axis=1)
    # A spreadsheet must not run a name, and a terminal must not obey one.
    names = ["'=fat", "a/b", "\U0001f52c\\n"]
    assert [row[1] for row in rows] == [names[number] for number in called]
    counts = np.bincount(called, minlength=3).tolist()
    assert summary["counts"] == dict(zip(CLASSES, counts, strict=True))
    assert (summary["n"], summary["positives"], summary["threshold"]) == (11, None, None)
    json.dumps(summary)


def test_a_larger_picture_has_a_folder_of_maps(three, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (130, 200, 3), dtype=np.uint8)
    for name in ("big.png", "below/big.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    # A map of two classes that an earlier run may have left has the folder's name.
    maps = three / "heatmaps"
    tiles = heatmap.TileProbabilities(32, [(0, 0, 0.5)])
    heatmap.write_heatmap(maps / "big.png", tmp_path / "big.png", tiles, 0.5)
    summary = predict_three(three, tmp_path)
    assert summary["n"] == sum(summary["counts"].values()) == 2 * 5 * 7
    decided = {row["decision"] for row in rows_of(three)}
    files = {"'=fat": "0__fat.png", "a/b": "1_a_b.png", "\U0001f52c\\n": "2___.png"}
    expected = {"classes.png", *(files[name] for name in decided)}
    for folder in ("big.png", "below/big.tif"):
        assert {path.name for path in (maps / folder).iterdir()} == expected
        assert all(Image.open(file).width > 200 for file in (maps / folder).iterdir())
    written = {str(path) for path in maps.rglob("*.png") if path.is_file()}
    assert set(summary["heatmaps"]) == written
    # A later run of another input removes them.
    np.savez(tmp_path / "patches.npz", images=pixels[None, :96, :96])
    assert predict_three(three, tmp_path / "patches.npz")["heatmaps"] == []
    assert not list(maps.rglob("*"))


def test_pictures_with_similar_names_get_maps_of_their_own(run_summary, workdir, scoring, tmp_path):
    config, best = scoring()
    wide = np.zeros((96, 128, 3), np.uint8)
    for name in ("a.tif", "a.tif.png", "b/a.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(wide).save(tmp_path / name)
    summary = predict.predict_files(config, workdir, best, tmp_path)
    assert len(set(summary["heatmaps"])) == 3
    assert all(os.path.exists(file) for file in summary["heatmaps"])


def test_a_picture_of_another_scale_gets_no_score(run_summary, workdir, scoring, tmp_path):
    config, best = scoring()
    config.data.mpp = 0.972
    for name, mpp in (("a.tif", 0.24), ("b.tif", 0.93)):
        image = np.zeros((96, 96, 3), np.uint8)
        tifffile.imwrite(tmp_path / name, image, photometric="rgb", resolutionunit="CENTIMETER",
                         resolution=(1e4 / mpp, 1e4 / mpp))  # fmt: skip
    summary = predict.predict_files(config, workdir, best, tmp_path)
    assert summary["n"] == 1
    (refused,) = summary["unreadable"]
    assert refused["file"] == "a.tif"
    assert "says 0.24 um per pixel, but the network's patches have 0.972" in refused["reason"]
    (tmp_path / "b.tif").unlink()
    with pytest.raises(UserError, match=r"says 0\.24 um per pixel"):
        predict.predict_files(config, workdir, best, tmp_path)


def test_a_missing_input_is_named_before_a_checkpoint_is_read(small_config, tmp_path):
    with pytest.raises(UserError, match="--input is missing"):
        predict.predict_files(small_config(), tmp_path, tmp_path, None)
    with pytest.raises(UserError, match="no such file"):
        predict.predict_files(small_config(), tmp_path, tmp_path, tmp_path / "nowhere")


# Prints the peak memory of the whole process, in MiB, after it has scored the patches of a file.
MEASURE = """
import resource, sys
from pathlib import Path
from bef_jax import predict; from bef_jax.scoring import trained
workdir = Path(sys.argv[1])
best = trained.find(workdir)
config = trained.scoring_config(best, None, {"eval.batch_size": 64, "rcc.eval_size": 32})
found = predict.predict_files(config, workdir, best, Path(sys.argv[2]))
assert found["n"] == int(sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_equal_patches(path, count):
    """Writes `count` patches: the same chunk, compressed once, many times."""
    block = np.zeros((50, 96, 96, 3), np.uint8) + np.arange(96, dtype=np.uint8)[:, None, None]
    packed = zlib.compress(block.tobytes())
    with h5py.File(path, "w") as file:
        shape = (count, *block.shape[1:])
        x = file.create_dataset("x", shape, np.uint8, chunks=block.shape, compression="gzip")
        for first in range(0, count, len(block)):
            x.id.write_direct_chunk((first, 0, 0, 0), packed)


def extra_memory(few, many, folder, workdir):
    """Returns how many MiB higher the peak is with `many` patches than with `few`."""
    fast = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # because the program runs often
    peaks = []
    for count in (few, many):
        write_equal_patches(folder / "patches.h5", count)
        words = (sys.executable, "-c", MEASURE, workdir, folder / "patches.h5", count)
        result = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, env=fast)
        peaks.append(int(result.stdout.splitlines()[-1]))
    return peaks[1] - peaks[0]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_patches(run_summary, workdir, tmp_path):
    """16,000 more patches are 420 MiB of pixels, so keeping them would exceed the limit."""
    assert extra_memory(1_000, 17_000, tmp_path, workdir) < 120


@pytest.mark.long
def test_a_million_patches_need_what_a_few_need(run_summary, workdir, tmp_path):
    """Allows one GiB more, where the pixels of all patches would be 26 GiB."""
    assert extra_memory(1_000, 1_000_000, tmp_path, workdir) < 1024


@pytest.mark.slow
def test_the_command_prints_a_summary_and_names_bad_files(
    run_summary, workdir, small_config, tmp_path
):
    config = small_config()
    image = store.open_split(store.store_path(config.data), "test").images[0]
    Image.fromarray(image).save(tmp_path / "=one.png")
    shutil.copy(tmp_path / "=one.png", os.fsencode(tmp_path) + b"/\xff.png")  # not UTF-8
    command = [
        sys.executable, "-m", "bef_jax.main", "--mode=predict",
        f"--workdir={workdir}", f"--input={tmp_path}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((workdir / "predict_summary.json").read_text())
    assert json.loads(result.stdout)["seconds"] > 0
    # The quote makes it text for a spreadsheet; the escape can be shown in a terminal.
    assert [row["id"] for row in rows_of(workdir)] == ["'=one.png", "\\udcff.png"]
    (tmp_path / "two\nlines \x1b[31m.png").write_bytes(b"no picture")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert json.loads(result.stdout)["n"] == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("failed: 1 of the pictures can't be read and got no prediction;")
    assert r"two\nlines \x1b[31m.png: cannot be read" in last
