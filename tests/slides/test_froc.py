"""FROC of random slides, compared with loops; and the mode from its files to its files."""

import csv
import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import shapely
from skimage import measure

from bef_jax.scoring import intervals
from bef_jax.slides.annotations import read_annotation
from bef_jax.slides.froc import evaluate, evaluate_slides
from bef_jax.slides.froc.curve import Froc, Hits
from tests.slides.test_lesions import random_truth, slow_labels
from tests.slides.truth_files import (
    DOT,
    REFERENCE,
    SQUARE,
    hand_made,
    write_asap,
    write_mask,
    write_run,
)

RATES = (0.25, 0.5, 1, 2, 4, 8)
MPP = 0.243


# ---- the same in loops --------------------------------------------------------------------------


def slow_hits(labels, detections, factor):
    """Returns false positives, and the best probability of each lesion that is no ITC."""
    itc = [r.label for r in measure.regionprops(labels) if r.axis_major_length * MPP * 32 < 275]
    best = {label: None for label in range(1, labels.max() + 1) if label not in itc}
    false = []
    for x, y, probability in detections:
        label = labels[int(y / factor), int(x / factor)]
        if label == 0:
            false.append(probability)
        elif label not in itc and (best[label] is None or probability > best[label]):
            best[label] = probability
    return false, list(best.values()), len(itc)


def slow_froc(slides):
    """Returns the sensitivities at RATES; `slides` are pairs of false positives and lesions."""
    lesions = [best for _, each in slides for best in each]
    points = [(0.0, 0.0)]
    thresholds = {p for false, each in slides for p in [*false, *each] if p is not None}
    for threshold in sorted(thresholds, reverse=True):
        false = sum(p >= threshold for each, _ in slides for p in each)
        found = sum(p is not None and p >= threshold for p in lesions)
        points.append((false / len(slides), found / len(lesions)))
    return [slow_interp(rate, points) for rate in RATES]


def slow_interp(rate, points):
    """Interpolates; of points at the same place the highest counts."""
    best = {}
    for x, y in points:
        best[x] = max(best.get(x, 0), y)
    left = max(x for x in best if x <= rate)
    right = min((x for x in best if x > rate), default=None)
    if right is None or left == rate:
        return best[left]
    # From the right, a line begins at the first point there, which is the lowest.
    low = min(y for x, y in points if x == right)
    return best[left] + (low - best[left]) / (right - left) * (rate - left)


def slow_auc(scores, labels):
    pairs = [
        (a > b) + (a == b) / 2
        for a, x in zip(scores, labels, strict=True) if x
        for b, y in zip(scores, labels, strict=True) if not y
    ]  # fmt: skip
    return sum(pairs) / len(pairs) if pairs else None


# ---- random slides ------------------------------------------------------------------------------


def random_slide(rng, folder, name):
    """Writes the truth of a slide; returns the true mask, and what was found."""
    shape = rng.integers(40, 60), rng.integers(40, 60)
    size = [int(32 * side - rng.integers(0, 32)) for side in shape[::-1]]
    truth = random_truth(rng, shape) & (rng.random() < 0.8)
    if rng.random() < 0.5:
        write_mask(folder / f"{name}_mask.tif", truth, int(rng.choice([1, 255])))
    else:
        truth = random_polygons(rng, folder / f"{name}.xml", shape)
    count = rng.integers(0, 40)
    detections = rng.uniform(0, 1, (count, 3)) * (*size, 1)
    detections[:, 2] = np.round(detections[:, 2], int(rng.choice([1, 16])))
    found = {"width": size[0], "height": size[1], "mpp": MPP, "detections": detections.tolist()}
    return truth, found | {"score": float(np.round(rng.random(), 1))}


def random_polygons(rng, file, shape):
    """Writes boxes of tumour and of exclusion; returns the mask, with shapely."""
    boxes = []
    for group in rng.choice(["Tumor", "_0", "exclusion", "_2"], rng.integers(1, 8)):
        x, y = rng.uniform(-5, 55, 2) * 32
        w, h = rng.uniform(0.1, 25, 2) * 32
        boxes.append((group, [(x, y), (x + w, y + h / 3), (x + w, y + h), (x - w / 4, y + h)]))
    write_asap(file, boxes)
    parts = {
        kind: shapely.unary_union([shapely.Polygon(p) for g, p in boxes if g in kind])
        for kind in (("Tumor", "_0"), ("exclusion", "_2"))
    }
    tumour, excluded = parts.values()
    rows, columns = (np.indices(shape) + 0.5) * 32
    return shapely.contains_xy(tumour.difference(excluded), columns, rows)


@pytest.mark.parametrize("seed", range(20))
def test_ten_random_slides_are_judged_as_by_loops(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 20)
    monkeypatch.setattr(evaluate, "write_froc_page", lambda *_: None)
    rng = np.random.default_rng(seed)
    truth_dir = tmp_path / "truth"
    truth_dir.mkdir()
    slides = {f"s{number}": random_slide(rng, truth_dir, f"s{number}") for number in range(10)}
    write_run(tmp_path / "run", {name: found for name, (_, found) in slides.items()})
    summary = evaluate_slides(tmp_path / "run", truth_dir)
    hits = [
        slow_hits(slow_labels(truth, MPP * 32), found["detections"], 32)
        for truth, found in slides.values()
    ]
    right = slow_froc([each[:2] for each in hits])
    np.testing.assert_allclose(list(summary["sensitivity"].values()), right, rtol=0, atol=1e-12)
    assert summary["froc"] == pytest.approx(sum(right) / 6, rel=0, abs=1e-12)
    labels = [truth.any() for truth, _ in slides.values()]
    auc = slow_auc([found["score"] for _, found in slides.values()], labels)
    assert summary["slide_auc"] == pytest.approx(auc, rel=0, abs=1e-12)
    assert summary["n_lesions"] == sum(len(each[1]) for each in hits)
    assert summary["n_itc"] == sum(each[2] for each in hits)
    assert summary["n_tumour_slides"] == sum(labels)


# ---- one case by hand ---------------------------------------------------------------------------


def test_a_case_by_hand(tmp_path):
    run, truth = hand_made(tmp_path, REFERENCE)
    summary = evaluate_slides(run, truth)
    found = {"0.25": 1 / 3, **dict.fromkeys(("0.5", "1", "2", "4", "8"), 2 / 3)}
    assert summary["sensitivity"] == pytest.approx(found, abs=1e-12)
    assert summary["froc"] == pytest.approx(11 / 18, abs=1e-12)
    # Pairs of a tumour slide and a normal one: b and c tie, all others are in order.
    assert summary["slide_auc"] == 7 / 8
    assert (summary["n_slides"], summary["n_lesions"], summary["n_itc"]) == (4, 3, 1)
    none = {"none": 0, "ITC": 0, "micro": 0, "macro": 0}
    assert summary["confusion"] == {
        "none": none | {"none": 1, "ITC": 1}, "ITC": none, "micro": none,
        "macro": none | {"micro": 1, "macro": 1},
    }  # fmt: skip
    # A resample draws neither a nor b with a probability of 1/16.
    assert summary["froc_ci95"] is None
    assert summary["reasons"] == {"froc_ci95": "more than 2.5 % of the resamples have no lesion"}
    with open(run / "froc" / "lesions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["slide"], row["itc"], row["probability"]) for row in rows] == [
        ("a", "0", "0.9"), ("a", "0", ""), ("a", "1", "0.95"), ("b", "0", "0.5"),
    ]  # fmt: skip
    assert [row["false_positives"] for row in rows] == ["0.0", "", "0.0", "0.5"]
    assert (rows[0]["x"], rows[0]["y"]) == ("1120", "1120")
    with open(run / "froc" / "curve.csv", newline="") as file:
        curve = list(csv.DictReader(file))
    assert [float(row["threshold"]) for row in curve] == [math.inf, 0.9, 0.8, 0.7, 0.5, 0.4, 0.3]
    assert [float(row["false_positives"]) for row in curve] == [0, 0, 1 / 4, 1 / 2, 1 / 2, 1, 5 / 4]
    text = (run / "froc" / "index.html").read_text()
    assert ">0.6111<" in text and "0.8750" in text and "not found" in text
    assert all((run / "froc" / name).exists() for name in ("froc.png", "index.html"))
    assert [*map(str, sorted((run / "froc").iterdir()))] == sorted(summary["files"])


def test_intervals_of_many_slides(tmp_path, monkeypatch):
    """The score's interval is that of scores of lists of slides, drawn again and again."""
    monkeypatch.setattr(evaluate, "write_froc_page", lambda *_: None)
    rng = np.random.default_rng(0)
    (tmp_path / "truth").mkdir()
    slides = {}
    for name in map(str, range(30)):
        write_asap(tmp_path / "truth" / f"{name}.xml", [("Tumor", SQUARE)])
        found = [(9, 9, rng.random())] * (rng.random() < 0.6)
        slides[name] = {"detections": found + [(6000, 4000, p) for p in rng.random(3)]}
    summary = evaluate_slides(write_run(tmp_path / "run", slides), tmp_path / "truth")
    pairs = [
        ([p for x, _, p in each["detections"] if x > 9],
         [p for x, _, p in each["detections"] if x == 9] or [None])
        for each in slides.values()
    ]  # fmt: skip
    draws = (rng.integers(0, 30, 30) for _ in range(400))
    scores = [np.mean(slow_froc([pairs[k] for k in draw])) for draw in draws]
    low, high = summary["froc_ci95"]
    assert low < summary["froc"] < high
    np.testing.assert_allclose([low, high], np.percentile(scores, [2.5, 97.5]), atol=0.03)


def test_the_same_twice(tmp_path):
    run, truth = hand_made(tmp_path)
    first = evaluate_slides(run, truth)
    files = {file.name: file.read_bytes() for file in (run / "froc").iterdir()}
    assert evaluate_slides(run, truth) == first
    assert files == {file.name: file.read_bytes() for file in (run / "froc").iterdir()}
    assert first["confusion"] is None


def test_the_band_is_that_of_resampled_slides():
    """The interval of a resample's score holds the share that theory gives it."""
    # Of 40 slides with one lesion each and no false positives, 30 lesions are found.
    slides = [Hits(np.zeros(0), np.array([0.9 if k < 30 else np.nan])) for k in range(40)]
    found = Froc(slides).resampled([1.0])[:, 0]
    assert found.mean() == pytest.approx(0.75, abs=0.01)
    assert found.std() == pytest.approx(math.sqrt(0.75 * 0.25 / 40), rel=0.1)


def test_weights_are_copies_of_slides():
    rng = np.random.default_rng(0)
    slides = [
        Hits(rng.random(rng.integers(0, 9)).round(1), rng.random(rng.integers(0, 4)).round(1))
        for _ in range(9)
    ]
    weights = rng.integers(0, 3, 9)
    copies = [each for each, n in zip(slides, weights, strict=True) for _ in range(n)]
    np.testing.assert_allclose(
        Froc(slides).curve(weights).at(RATES), Froc(copies).curve().at(RATES), atol=1e-12
    )


# ---- what is missing ----------------------------------------------------------------------------


def test_without_lesions_figures_are_none_with_a_reason(tmp_path, caplog):
    run = write_run(tmp_path / "run", {"a": {"detections": [(1, 1, 0.5)]}, "b": {"score": None,
                    "windows": 0}})  # fmt: skip
    (tmp_path / "truth").mkdir()
    with caplog.at_level(logging.WARNING, "bef_jax"):
        summary = evaluate_slides(run, tmp_path / "truth")
    assert "all count as normal" in caplog.text
    assert summary["froc"] is summary["froc_ci95"] is summary["slide_auc"] is None
    assert set(summary["sensitivity"].values()) == {None}
    assert summary["reasons"].keys() == {"froc", "slide_auc"}
    assert json.loads(json.dumps(summary)) == summary
    assert "There is no FROC score" in (run / "froc" / "index.html").read_text()
    assert (run / "froc" / "curve.csv").read_text().splitlines()[1] == "inf,0.0,"


def test_an_itc_alone_is_tumour_but_no_lesion(tmp_path):
    run = write_run(tmp_path / "run", {"a": {"score": 0.7}, "b": {"score": 0.2}})
    (tmp_path / "truth").mkdir()
    write_asap(tmp_path / "truth" / "a.xml", [("Tumor", DOT + 640)])
    summary = evaluate_slides(run, tmp_path / "truth")
    assert (summary["froc"], summary["n_itc"], summary["n_lesions"]) == (None, 1, 0)
    assert summary["slide_auc"] == 1.0


def test_no_detections_at_all(tmp_path):
    run = write_run(tmp_path / "run", {"a": {}, "b": {}})
    (tmp_path / "truth").mkdir()
    write_asap(tmp_path / "truth" / "a.xml", [("Tumor", SQUARE)])
    summary = evaluate_slides(run, tmp_path / "truth")
    assert summary["froc"] == 0 and set(summary["sensitivity"].values()) == {0}


def test_the_command(tmp_path):
    run, truth = hand_made(tmp_path)
    command = [sys.executable, "-m", "bef_jax.main", "--mode=froc", f"--workdir={run}"]
    done = subprocess.run([*command, f"--truth={truth}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["mode"] == "froc" and summary["seconds"] > 0
    assert json.loads((run / "froc_summary.json").read_text()) == summary
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: --truth is missing")


def test_the_truth_of_a_test_case_is_what_it_says(tmp_path):
    """The hand-made case has the lesions that its text says."""
    _, truth = hand_made(tmp_path)
    size = (6400, 4800)
    mask = read_annotation(truth / "a.xml", size).area(0, 0, (32, 32), (150, 200))
    regions = measure.regionprops(slow_labels(mask, MPP * 32))
    axes = [region.axis_major_length * MPP * 32 for region in regions]
    assert [axis < 275 for axis in axes] == [False, False, True]
