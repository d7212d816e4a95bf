"""Scores folders of small slides, and stops, resumes and disturbs runs on the way."""

import csv
import gzip
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import bef_jax
from bef_jax import predict
from bef_jax.errors import RunError, UserError
from bef_jax.runtime import exit
from bef_jax.scoring import slide_scorer
from bef_jax.slides import blocks
from bef_jax.slides import predict as slides_predict
from bef_jax.slides.outputs import write as outputs
from tests.slides.slide_files import GLASS, tissue_pixels, write_pyramid

MPP = 0.972


@pytest.fixture
def cheap(monkeypatch):
    """Puts a function of the mean colour in the place of the network, which takes seconds."""

    class Uncompiled:
        engine = "jax float32"

        def __init__(self, config, variables, mesh):
            self.variables = variables

        def expect(self, count):
            pass

    def make_predictor(config, scorer, mesh):
        variables = scorer.variables

        def predict(patches, sizes=None):
            for patch in patches:
                means = patch.reshape(-1, 3).mean(axis=0) ** variables["params"]["x"]
                shares = means / means.sum() * (1 - config.eval.tta / 100)
                is_binary = config.model.num_classes == 2
                yield np.atleast_1d((shares[0] - 0.3) * 5) if is_binary else shares[None]

        return predict

    variables = {"params": {"x": np.float64(2)}, "batch_stats": {}}
    monkeypatch.setattr(predict.checkpoint, "restore_variables", lambda *_: variables)
    monkeypatch.setattr(predict, "EngineScorer", Uncompiled)
    monkeypatch.setattr(predict, "make_predictor", make_predictor)
    # Drawing takes a second.
    monkeypatch.setattr(outputs, "write_heatmap", lambda file, *_: file.write_bytes(b""))
    return variables


@pytest.fixture
def glass():
    """Returns glass(rows): pixels of that many rows of blocks, with tissue in the upper left."""

    def make(rows, seed=0):
        pixels = np.full((rows * 960 - 100, 250, 3), GLASS, np.uint8)
        for top in range(0, len(pixels) - 200, 960):
            pixels[top + 40 : top + 140, 20:150] = tissue_pixels(130, 100, seed + top)
        return pixels

    return make


@pytest.fixture
def slide(tmp_path, glass):
    """Returns slide(name, rows, **options): writes a slide below tmp_path/in."""

    def make(name="a.tif", rows=1, seed=0, **options):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"mpp": MPP, "downsamples": (1, 2), "compression": "deflate"} | options
        return write_pyramid(path, glass(rows, seed), **options)

    return make


@pytest.fixture
def reads(monkeypatch):
    """Returns a list to which the first row and column of each block is added that is read."""
    read, original = [], blocks.read_block

    def counted(slide, grid, block):
        read.append((slide.path.name, block.rows.start, block.columns.start))
        return original(slide, grid, block)

    monkeypatch.setattr(blocks, "read_block", counted)
    return read


def table(workdir):
    with open(workdir / "slides.csv", newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def windows(folder):
    with gzip.open(folder / "tiles.csv.gz", "rt", newline="") as file:
        return [[float(x or "nan") for x in row] for row in list(csv.reader(file))[1:]]


def results(workdir):
    """Returns the bytes of all files of the slides, the table and the page."""
    found = {}
    for path in [*(workdir / "slides").rglob("*"), workdir / "slides.csv", workdir / "slides.html"]:
        if path.name == "slide.json":
            found[path.relative_to(workdir)] = json.loads(path.read_text()) | {"seconds": 0}
        elif path.is_file():
            found[path.relative_to(workdir)] = path.read_bytes()
    return found


def test_windows_get_the_scores_of_their_pixels(network, slide, glass, networks, tmp_path):
    """Cuts the tiles by NumPy alone."""
    config, best = network()
    path = slide(rows=2)
    run = tmp_path / "run"
    summary = predict.predict_files(config, run, best, path)
    pixels = np.pad(glass(2), ((32, 96), (32, 96), (0, 0)), mode="reflect")
    inside = np.pad(np.ones(glass(2).shape[:2], bool), ((32, 96), (32, 96)))
    most, least = pixels.max(-1).astype(float), pixels.min(-1)
    coloured = inside & ((most - least) / most >= 0.07)
    places = [
        (x, y)
        for y in range(0, 1820, 32)
        for x in range(0, 250, 32)
        if coloured[y + 32 : y + 64, x + 32 : x + 64].any()
    ]
    tiles = np.stack([pixels[y : y + 96, x : x + 96] for x, y in places])
    expected = bef_jax.load(networks()).predict(tiles)
    found = windows(run / "slides" / "a")
    assert [(x, y, side) for x, y, side, _ in found] == [(x, y, 32) for x, y in places]
    np.testing.assert_allclose([row[3] for row in found], expected, rtol=1e-5)
    assert summary["n"] == len(places)
    assert summary["positives"] == int((np.array([row[3] for row in found]) >= 0.5).sum())
    assert summary["predictions"] is None
    assert summary["unreadable"] == summary["heatmaps"] == []
    of_slides = summary["slides"]
    assert (of_slides["n"], of_slides["done"], of_slides["failed"]) == (1, 1, 0)
    assert (of_slides["windows"], of_slides["failed_windows"]) == (len(places), 0)
    assert Path(of_slides["table"]).is_file()
    assert Path(of_slides["page"]).is_file()
    assert 0 <= of_slides["input_wait_fraction"] <= 1
    assert of_slides["tiles_per_second"] > 0
    assert not (run / "predictions.csv").exists()
    assert not list(run.rglob(".partial"))


class KilledError(BaseException):
    """Stands for SIGKILL."""


def killed_in_row(monkeypatch, number):
    """Lets scoring end with an error in this row of blocks, after it was read."""
    original, done = slide_scorer.score_row, []

    def score_row(*args):
        found = original(*args)
        done.append(1)
        if len(done) == number:
            raise KilledError
        return found

    monkeypatch.setattr(slides_predict, "score_row", score_row)


def test_a_killed_run_goes_on_in_the_slide(network, cheap, slide, reads, tmp_path, monkeypatch):
    config, best = network()
    path = slide(rows=4)
    predict.predict_files(config, tmp_path / "a" / "run", best, path)
    assert len(reads) == 4
    reads.clear()
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_in_row(patch, 3)
        predict.predict_files(config, tmp_path / "b" / "run", best, path)
    (tmp_path / "b/run/slides/a/.tmp-1-ab").write_bytes(b"half of it")
    predict.predict_files(config, tmp_path / "b" / "run", best, path)
    assert [row for _, row, _ in reads] == [0, 30, 60, 60, 90]
    assert results(tmp_path / "b" / "run") == results(tmp_path / "a" / "run")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_row_in_hand(
    signum, network, cheap, slide, reads, tmp_path, monkeypatch
):
    config, best = network()
    slide("case/a.tif", rows=3)
    slide("b.tif")
    predict.predict_files(config, tmp_path / "a" / "run", best, tmp_path / "in")
    reads.clear()
    run, original = tmp_path / "b" / "run", slide_scorer.score_row

    def score_row(*args):
        os.kill(os.getpid(), signum)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(slides_predict, "score_row", score_row)
        for line in (
            r"stopped in case/a.tif, before row of blocks 1 of 3 \(slide 2 of 2\)",
            r"stopped in case/a.tif, before row of blocks 2 of 3 \(slide 2 of 2\)",
            r"stopped in case/a.tif, before row of blocks 3 of 3 \(slide 2 of 2\)",
        ):
            with pytest.raises(RunError, match=f"{line}; the same command goes on there"):
                predict.predict_files(config, run, best, tmp_path / "in")
        # The signal comes with the last row, after which there is no more to stop.
        assert predict.predict_files(config, run, best, tmp_path / "in")["slides"]["done"] == 2
    assert len(reads) == 4
    assert results(run) == results(tmp_path / "a" / "run")


def test_a_slide_that_is_done_is_not_read_again(network, cheap, slide, reads, tmp_path, caplog):
    config, best = network()
    path, run = slide(rows=2), tmp_path / "run"
    first = predict.predict_files(config, run, best, path)
    before = results(run)
    reads.clear()
    (run / "slides/a/.partial").mkdir()  # of a kill right after slide.json was written
    again = predict.predict_files(config, run, best, path)
    assert not reads
    assert results(run) == before
    assert not (run / "slides/a/.partial").exists()
    assert (again["n"], again["positives"]) == (first["n"], first["positives"])
    assert again["slides"]["tiles_per_second"] is again["slides"]["input_wait_fraction"] is None
    assert (first["slides"]["saved_windows"], again["slides"]["saved_windows"]) == (0, first["n"])
    assert again["images_per_second"] == 0 < first["images_per_second"]
    record = run / "slides" / "a" / "slide.json"
    content = json.loads(record.read_text())
    for damaged in ("", "{", "[]", json.dumps(content | {"failed": "0"}), '{"fingerprint": 1}'):
        record.write_text(damaged)
        reads.clear()
        predict.predict_files(config, run, best, path)
        assert len(reads) == 2
        assert "slide.json: damaged" in caplog.text
        assert results(run) == before
        caplog.clear()


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"predict.stride": 16}, 2),
        ({"eval.tta": 8}, 2),
        ({"eval.threshold": 0.4}, 2),
        ({"slides.detection_radius": 99.0}, 2),
        ({"eval.batch_size": 4}, 0),
    ],
)
def test_what_decides_the_results_makes_them_anew(
    changes, rows, network, cheap, slide, reads, tmp_path
):
    path, run = slide(rows=2), tmp_path / "run"
    config, best = network()
    predict.predict_files(config, run, best, path)
    reads.clear()
    config, best = network(**changes)
    predict.predict_files(config, run, best, path)
    assert len(reads) == rows
    fresh = tmp_path / "fresh" / "run"
    predict.predict_files(config, fresh, best, path)
    if rows:
        assert results(run) == results(fresh)


def test_another_stride_starts_the_slide_again(
    network, cheap, slide, reads, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="bef_jax")
    config, best = network()
    path, run = slide(rows=2), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_in_row(patch, 2)
        predict.predict_files(config, run, best, path)
    reads.clear()
    config, best = network(**{"predict.stride": 64})
    predict.predict_files(config, run, best, path)
    assert len(reads) == 2
    assert caplog.text.count("the slide starts again") == 1
    # The threshold decides no probability, so what was saved still counts.
    os.utime(path, (1, 1))
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_in_row(patch, 2)
        predict.predict_files(config, run, best, path)
    reads.clear()
    config.eval.threshold = 0.3
    predict.predict_files(config, run, best, path)
    assert len(reads) == 1


def test_a_slide_is_finished_by_the_engine_that_began_it(
    network, cheap, slide, reads, tmp_path, monkeypatch
):
    config, best = network()
    path, run = slide(rows=2), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_in_row(patch, 2)
        predict.predict_files(config, run, best, path)
    reads.clear()
    monkeypatch.setattr(predict.EngineScorer, "engine", "onnxruntime float32")
    summary = predict.predict_files(config, run, best, path)
    assert len(reads) == 2  # the first row was scored by JAX
    record = json.loads((run / "slides/a/slide.json").read_text())
    assert record["engine"] == summary["engine"] == "onnxruntime float32"
    # A slide that is done stays so.
    reads.clear()
    monkeypatch.setattr(predict.EngineScorer, "engine", "jax float32")
    predict.predict_files(config, run, best, path)
    assert not reads


def test_other_weights_score_a_slide_again(network, cheap, slide, reads, tmp_path):
    config, best = network()
    path = slide()
    predict.predict_files(config, tmp_path / "run", best, path)
    cheap["params"]["x"] = np.float64(2.1)
    predict.predict_files(config, tmp_path / "run", best, path)
    assert len(reads) == 2


def test_broken_slides_do_not_cost_the_good_ones(network, cheap, slide, tmp_path, capsys):
    config, best = network()
    for number in range(37):
        slide(f"group_{number % 3}/{number:02d}.tif", seed=number)
    folder = tmp_path / "in"
    (folder / "empty.svs").write_bytes(b"")
    (folder / "text.ndpi").write_text("no slide")
    os.mkfifo(folder / "fifo.svs")
    run = tmp_path / "run"
    summary = predict.predict_files(config, run, best, folder)
    rows = table(run)
    assert list(rows) == sorted(rows)
    assert sum(row["status"] == "done" for row in rows.values()) == 37
    failed = {name for name, row in rows.items() if row["status"] == "failed"}
    assert failed == {"empty", "text", "fifo"}
    assert all(rows[name]["error"] for name in failed)
    assert [each["file"] for each in summary["unreadable"]] == [
        "empty.svs",
        "fifo.svs",
        "text.ndpi",
    ]
    found = summary["slides"]
    assert (found["n"], found["done"], found["failed"]) == (40, 37, 3)
    assert exit.status_of(summary) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("failed: 3 of the slides and pictures can't be read")
    assert "empty.svs, fifo.svs, text.ndpi; predict_summary.json lists them" in line
    json.dumps(summary)


def test_slides_pictures_and_patches_are_told_apart(network, cheap, slide, tmp_path):
    config, best = network()
    slide("a.tif")
    noise = np.random.default_rng(0).integers(0, 256, (130, 200, 3), dtype=np.uint8)
    Image.fromarray(noise[:96, :96]).save(tmp_path / "in" / "patch.png")
    Image.fromarray(noise).save(tmp_path / "in" / "picture.tif")
    (tmp_path / "in" / "cut.png").write_bytes(b"cut")
    run = tmp_path / "run"
    summary = predict.predict_files(config, run, best, tmp_path / "in")
    with open(run / "predictions.csv", newline="") as file:
        names = {row["id"].split(":")[0] for row in csv.DictReader(file)}
    assert names == {"patch.png", "picture.tif"}
    assert list(table(run)) == ["a"]
    patches = 1 + 5 * 7
    assert summary["n"] == patches + summary["slides"]["windows"] > patches
    assert [each["file"] for each in summary["unreadable"]] == ["cut.png"]
    assert summary["predictions"] == str(run / "predictions.csv")
    assert [Path(file).name for file in summary["heatmaps"]] == ["picture.tif.png"]
    # With slides alone, earlier predictions stay.
    before = (run / "predictions.csv").read_bytes()
    summary = predict.predict_files(config, run, best, tmp_path / "in" / "a.tif")
    assert summary["predictions"] is None
    assert (run / "predictions.csv").read_bytes() == before
    # Pictures alone are as they were before there were slides.
    summary = predict.predict_files(config, run, best, tmp_path / "in" / "patch.png")
    assert (summary["n"], summary["slides"]) == (1, None)


def test_pictures_that_cannot_be_read_do_not_cost_the_slides(network, cheap, slide, tmp_path):
    config, best = network()
    slide("a.tif")
    (tmp_path / "in" / "cut.png").write_bytes(b"cut")
    summary = predict.predict_files(config, tmp_path / "run", best, tmp_path / "in")
    assert summary["slides"]["done"] == 1
    assert summary["predictions"] is None
    assert [each["file"] for each in summary["unreadable"]] == ["cut.png"]
    assert not (tmp_path / "run" / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mpp": None}, r"does not say its um per pixel; give --config\.slides\.mpp"),
        ({"mpp": 2.0}, "coarser than the network's 0.972"),
        ({"mpp": (0.972, 1.2)}, "square"),
    ],
)
def test_a_slide_of_no_use_is_refused_before_a_network_is_read(
    options, words, network, slide, tmp_path
):
    config, _ = network()
    slide(**options)
    for path in (tmp_path / "in" / "a.tif", tmp_path / "in"):
        with pytest.raises(UserError, match=words) as raised:
            predict.predict_files(config, tmp_path / "run", tmp_path / "no_checkpoint", path)
        assert "a.tif: " in str(raised.value)


def test_a_network_without_a_scale_scores_no_slide(network, slide, tmp_path):
    config, best = network()
    slide()
    config.data.mpp = 0.0
    with pytest.raises(UserError, match=r"a\.tif: .* give --config\.data\.mpp"):
        predict.predict_files(config, tmp_path / "run", best, tmp_path / "in")


def test_a_given_scale_counts_instead_of_the_slides_own(network, cheap, slide, tmp_path):
    path = slide(mpp=None)
    config, best = network(**{"slides.mpp": MPP / 2})
    predict.predict_files(config, tmp_path / "run", best, path)
    row = table(tmp_path / "run")["a"]
    assert float(row["mpp"]) == MPP / 2
    assert row["level"] == "1"
    for value in (-1.0, float("nan"), 1e9, "x"):
        with pytest.raises(UserError, match=r"config\.slides\.mpp"):
            network(**{"slides.mpp": value})
    for field in ("slides.top", "slides.detection_threshold", "slides.detection_radius"):
        with pytest.raises(UserError, match=field.replace(".", r"\.")):
            network(**{field: -1})


def test_names_of_any_letters_are_kept(network, cheap, slide, tmp_path):
    config, best = network()
    slide("\U0001f52c case/=a\tb.tif")
    slide("\U0001f52c case/b.tif")
    (tmp_path / "in" / "\U0001f52c case" / "b.svs").write_bytes(b"")
    run = tmp_path / "\U0001f52c run"
    summary = predict.predict_files(config, run, best, tmp_path / "in")
    assert (run / "slides" / "\U0001f52c case" / "=a\tb" / "slide.json").is_file()
    assert set(table(run)) == {
        "\U0001f52c case/=a\\tb", "\U0001f52c case/b.tif", "\U0001f52c case/b.svs",
    }  # fmt: skip
    (bad,) = summary["unreadable"]
    assert bad["file"] == "\U0001f52c case/b.svs"


def test_three_classes_are_counted(network, cheap, slide, tmp_path):
    config, best = network(3)
    summary = predict.predict_files(config, tmp_path / "run", best, slide(rows=2))
    assert summary["positives"] is summary["threshold"] is None
    assert sum(summary["counts"].values()) == summary["n"] == summary["slides"]["windows"] > 0
    row = table(tmp_path / "run")["a"]
    assert row["positives"] == row["score"] == ""
    # A slide that is done counts as well as one that is scored now.
    again = predict.predict_files(config, tmp_path / "run", best, tmp_path / "in")
    assert again["counts"] == summary["counts"]


def test_a_slide_that_vanishes_does_not_cost_the_others(
    network, cheap, slide, tmp_path, monkeypatch
):
    config, best = network()
    for name in ("a.tif", "b.tif", "c.tif", "d.tif"):
        slide(name, rows=2)
    original = slide_scorer.score_row

    def score_row(predictor, opened, grid, row, *args):
        if opened.path.name == "b.tif":
            (tmp_path / "in" / "c.tif").unlink(missing_ok=True)  # before its turn
            if row[0].rows.start:  # in the middle of its own turn
                raise UserError(f"{opened.path}: can no longer be opened")
        return original(predictor, opened, grid, row, *args)

    monkeypatch.setattr(slides_predict, "score_row", score_row)
    summary = predict.predict_files(config, tmp_path / "run", best, tmp_path / "in")
    rows = table(tmp_path / "run")
    assert [row["status"] for row in rows.values()] == ["done", "failed", "failed", "done"]
    assert rows["b"]["error"] == "can no longer be opened"
    assert [each["file"] for each in summary["unreadable"]] == ["b.tif", "c.tif"]


def test_the_table_has_the_slides_of_this_input_alone(network, cheap, slide, tmp_path):
    config, best = network()
    run = tmp_path / "run"
    predict.predict_files(config, run, best, slide("a.tif"))
    predict.predict_files(config, run, best, slide("b.tif"))
    assert list(table(run)) == ["b"]
    assert (run / "slides" / "a" / "slide.json").is_file()


def test_tables_of_an_earlier_input_are_named(network, cheap, slide, tmp_path, caplog):
    config, best = network()
    run, path, patch = tmp_path / "run", slide(), tmp_path / "p.png"
    Image.fromarray(tissue_pixels(96, 96)).save(patch)
    predict.predict_files(config, run, best, path)
    predict.predict_files(config, run, best, path)
    assert "earlier run" not in caplog.text
    predict.predict_files(config, run, best, patch)
    assert "slides.csv: is of an earlier run" in caplog.text
    predict.predict_files(config, run, best, path)
    assert "predictions.csv: is of an earlier run" in caplog.text


def test_results_are_no_input(network, cheap, slide, tmp_path):
    """The workdir lies in the input; one map is wide enough to be a pyramid."""
    folder = tmp_path / "in"
    slide("case/a.tif")
    Image.fromarray(tissue_pixels(96, 96)).save(folder / "p.png")
    pixels = np.full((200, 600 * 32, 3), GLASS, np.uint8)
    pixels[40:140, 20:150] = tissue_pixels(130, 100)
    write_pyramid(folder / "wide.tif", pixels, MPP, (1, 2), compression="deflate")
    config, best = network()
    for run in (folder / "out", folder / "out", folder):
        summary = predict.predict_files(config, run, best, folder)
        assert summary["unreadable"] == []
        assert list(table(run)) == ["case/a", "wide"]
        assert len((run / "predictions.csv").read_text().splitlines()) == 2
    with tifffile.TiffFile(folder / "out" / "slides" / "wide" / "probability.tif") as tif:
        assert len(tif.series[0].levels) > 1
    with pytest.raises(UserError, match="has only results of --mode=predict"):
        predict.predict_files(config, tmp_path / "x", best, folder / "out" / "slides")


def test_what_lies_in_the_way_is_named(network, cheap, slide, tmp_path):
    config, best = network()
    path, run = slide(), tmp_path / "run"
    (run / "slides.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"slides\.csv: is in the way of an output file"):
        predict.predict_files(config, run, best, path)
    (run / "slides.csv").rmdir()
    (run / "slides" / "a" / "slide.json").mkdir(parents=True)
    slide("b.tif")
    summary = predict.predict_files(config, run, best, tmp_path / "in")
    (bad,) = summary["unreadable"]
    assert "slide.json: is in the way" in bad["reason"]
    assert summary["slides"]["done"] == 1


def test_outputs_on_a_full_disk_end_the_run_and_lose_nothing(
    network, cheap, slide, reads, tmp_path, monkeypatch
):
    config, best = network()
    path, run = slide(rows=3), tmp_path / "run"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(slides_predict, "write_outputs", full)
        predict.predict_files(config, run, best, path)
    reads.clear()
    assert predict.predict_files(config, run, best, path)["slides"]["done"] == 1
    assert not reads
