import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bef_jax.metrics import Evaluation, binary_metrics
from bef_jax.report import _mistakes, _series, _smoothed, write_report

VOID = {"meta", "img", "source"}


def evaluation(split="valid", n=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n).astype(np.uint8)
    probabilities = np.clip(0.5 + 0.2 * (2.0 * labels - 1) + 0.3 * rng.normal(size=n), 0, 1)
    ids = np.array([f"{split}/{i}" for i in range(n)])
    return Evaluation(split, ids, labels, probabilities, binary_metrics(probabilities, labels))


def history(steps=8):
    train = [{"step": i, "epoch": i / 4, "loss": 1 / i} for i in range(1, steps + 1)]
    valid = [
        {"step": i, "epoch": i / 4, "valid_loss": 0.5, "valid_auc": 0.9, "valid_accuracy": None}
        for i in range(4, steps + 1, 4)
    ]
    return train + valid


def images(n=40):
    return np.random.default_rng(0).integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)


class Page(HTMLParser):
    """The text of each table cell, and a check that every element is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def embedded(page):
    return [base64.b64decode(text) for text in re.findall(r"base64,([^\"]+)", page)]


def test_writes_the_pictures_and_a_page_that_holds_them(tmp_path):
    evaluations = {split: evaluation(split) for split in ("valid", "test")}
    report = tmp_path / "b2" / "report"
    index = write_report(
        report, history(), evaluations, {"valid": images()}, {"params": 4010110, "epoch": 2.0}
    )
    assert index == report / "index.html"
    names = ["curves.png", "index.html", "most_wrong.png", "roc.png"]
    assert sorted(path.name for path in report.iterdir()) == names  # no temporary file is left
    page = index.read_text()
    assert "http" not in page and "<title>b2: report" in page
    cells = Page(page).cells
    assert f"{evaluations['test'].metrics['auc']:.4f}" in cells and "4,010,110" in cells
    pictures = embedded(page)
    assert len(pictures) == 6  # three, light and dark
    assert pictures[1] == (report / "curves.png").read_bytes()
    assert all(Image.open(io.BytesIO(png)).width > 1000 for png in pictures)


def test_a_second_report_replaces_the_first(tmp_path):
    write_report(tmp_path, history(), {}, {}, {"step": 1111})
    index = write_report(tmp_path, history(), {}, {}, {"step": 2222})
    assert "2,222" in index.read_text() and "1,111" not in index.read_text()


@pytest.mark.parametrize("lines", [[], history(1), history()])
def test_a_short_run_still_has_its_page(tmp_path, lines):
    page = write_report(tmp_path, lines, {}, {}, {}).read_text()
    assert len(embedded(page)) == 4 and "most wrong" not in page


def test_one_class_and_no_mistakes(tmp_path):
    probabilities, labels = np.array([0.1, 0.2]), np.zeros(2, int)
    seen = Evaluation(
        "valid", np.array(["a", "b"]), labels, probabilities, binary_metrics(probabilities, labels)
    )
    index = write_report(tmp_path, history(), {"valid": seen}, {"valid": images(2)}, {})
    assert "-" in Page(index.read_text()).cells


def test_what_users_name_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    ids = np.array([evil, evil])
    probabilities, labels = np.array([0.9, 0.1]), np.array([0, 1])
    figures = binary_metrics(probabilities, labels)
    evaluations = {"valid": Evaluation("valid", ids, labels, probabilities, figures)}
    folder = tmp_path / "<b>$x" / "report"
    index = write_report(folder, [], evaluations, {"valid": images(2)}, {"mode": evil})
    page = index.read_text()
    assert "<script" not in page and "<b>" not in page
    assert Page(page).cells.count(evil) == 3


def test_the_most_wrong_are_the_worst_by_brute_force():
    seen = evaluation(n=300)
    positives = [i for i in range(300) if not seen.labels[i] and seen.probabilities[i] >= 0.5]
    negatives = [i for i in range(300) if seen.labels[i] and seen.probabilities[i] < 0.5]
    found = _mistakes(seen)
    expected = sorted(positives, key=lambda i: -seen.probabilities[i])[:12]
    assert found["false positives"].tolist() == expected
    expected = sorted(negatives, key=lambda i: seen.probabilities[i])[:12]
    assert found["false negatives"].tolist() == expected


def test_gallery_reads_only_the_patches_it_shows(tmp_path):
    class Counting:
        def __init__(self):
            self.read = set()

        def __getitem__(self, index):
            self.read.add(index)
            return np.zeros((96, 96, 3), np.uint8)

    patches, seen = Counting(), evaluation(n=300)
    write_report(tmp_path, [], {"valid": seen}, {"valid": patches}, {})
    shown = np.concatenate(list(_mistakes(seen).values()))
    assert patches.read == set(shown.tolist()) and len(shown) == 24


def test_series_of_a_resumed_run_takes_the_last_line_of_a_step():
    lines = [
        {"step": step, "epoch": step / 2, "loss": loss}
        for step, loss in [(1, 0.9), (2, 0.8), (3, 0.7), (2, 0.81), (3, None)]
    ]
    epochs, values = _series([*lines, {"step": 3, "epoch": 1.5, "valid_loss": 0.1}], "loss")
    np.testing.assert_array_equal(epochs, [0.5, 1.0, 1.5])
    np.testing.assert_array_equal(values, [0.9, 0.81, np.nan])


def test_smoothing_is_the_mean_of_a_window():
    values = np.random.default_rng(0).normal(size=200)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(200)]
    np.testing.assert_allclose(_smoothed(values), expected, atol=1e-12)
    np.testing.assert_allclose(_smoothed(values[:50]), values[:50], atol=1e-12)
