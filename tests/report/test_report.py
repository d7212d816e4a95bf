"""Reports, whose pages and pictures are parsed again."""

import base64
import dataclasses
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bef_jax.report import Content, plots, write, write_report
from bef_jax.report.gallery import ShownPatch, contact_sheet
from bef_jax.report.theme import LIGHT
from tests.report.conftest import make_evaluation

VOID = {"meta", "img", "source"}
PLOTS = ["loss", "precision_recall", "reliability", "roc", "validation"]


class Page(HTMLParser):
    """Collects the text of each table cell, and checks that every element is closed in order."""

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


def test_writes_the_pictures_and_a_page_that_holds_them(tmp_path, evaluation, history, images):
    evaluations = {split: evaluation(split) for split in ("valid", "test")}
    report = tmp_path / "b2" / "report"
    summary = {"params": 4010110, "epoch": 2.0, "valid": {"ci95": {"accuracy": [0.111, 0.999]}}}
    tables = {"Data": [["source", "npz"]]}
    content = Content(history, evaluations, {"valid": images}, summary, tables)
    index = write_report(report, content)
    assert index == report / "index.html"
    names = sorted(["index.html", "most_wrong.png", *(f"{name}.png" for name in PLOTS)])
    assert sorted(path.name for path in report.iterdir()) == names  # no temporary file is left
    page = index.read_text()
    assert "http:" not in page and "https:" not in page and "<title>b2: report" in page
    cells = Page(page).cells
    assert f"{evaluations['test'].metrics['average_precision']:.4f}" in cells
    assert "4,010,110" in cells and "npz" in cells
    assert f"{evaluations['valid'].metrics['accuracy']:.2%} (11.10% to 99.90%)" in cells
    pictures = embedded(page)
    assert (report / "loss.png").read_bytes() in pictures
    plots, tiles = pictures[: 2 * len(PLOTS)], pictures[2 * len(PLOTS) :]
    assert all(Image.open(io.BytesIO(png)).width > 600 for png in plots)
    assert tiles and all(Image.open(io.BytesIO(png)).size == (96, 96) for png in tiles)


def test_every_tile_of_the_contact_sheet_has_its_own_caption():
    tile = np.full((96, 96, 3), 200, np.uint8)
    chosen = {0.935: "false positives", 0.8: "false positives", 0.1: "false negatives"}
    shown = [ShownPatch(kind, "id", p, tile, None) for p, kind in chosen.items()]
    assert shown[0].caption == "false positive, p = 0.935"
    assert shown[2].caption == "false negative, p = 0.100"
    sheet = contact_sheet([*shown, ShownPatch("true positives", "id", 1.0, tile, None)])
    assert sheet.shape[1] % 4 == 0  # a row of four: three mistakes, then a white tile
    tiles = np.split(sheet, 4, axis=1)
    captions = [tile[-22:] for tile in tiles]
    assert [(tile[6:198, 6:198] == 200).all() for tile in tiles] == [True] * 3 + [False]
    assert (captions[3] == 255).all()
    assert all((a != b).any() for a, b in itertools.combinations(captions, 2))


TUNED = "The temperature and the threshold were chosen on valid"
HEAT_MAPS = "The heat map (Grad-CAM)"


def test_a_table_of_the_operating_point_has_its_explanation(tmp_path):
    point = {"threshold": 0.31, "accuracy": 0.9}
    for operating_point, expected in ((point, True), (point | {"threshold": None}, False)):
        summary = {"valid": {"operating_point": operating_point, "calibrated": None}}
        page = write_report(tmp_path, Content([], {}, {}, summary)).read_text()
        assert (TUNED in page) == ("0.31" in Page(page).cells) == expected


def test_heat_maps_are_explained_only_if_there_are_any(tmp_path, evaluation, images):
    def explain(patches, _):
        return np.zeros((len(patches), 96, 96), np.float32)

    for explainer, width in ((explain, 196), (None, 96)):
        content = Content([], {"valid": evaluation()}, {"valid": images}, {}, explain=explainer)
        page = write_report(tmp_path, content).read_text()
        assert Image.open(io.BytesIO(embedded(page)[-1])).size == (width, 96)
        assert (HEAT_MAPS in page) == (explainer is not None)


def test_confusion_counts_every_patch(tmp_path, evaluation):
    seen = evaluation(n=200)
    page = write_report(tmp_path, Content([], {"valid": seen}, {}, {})).read_text()
    called = seen.probabilities >= 0.5
    for label in (0, 1):
        for decision in (False, True):
            count = int(((seen.labels == label) & (called == decision)).sum())
            share = count / (seen.labels == label).sum()
            assert f"{count:,} ({share:.1%})" in Page(page).cells


def test_a_second_report_replaces_the_first(tmp_path, history):
    write_report(tmp_path, Content(history, {}, {}, {"step": 1111}))
    index = write_report(tmp_path, Content(history, {}, {}, {"step": 2222}))
    assert "2,222" in index.read_text() and "1,111" not in index.read_text()


@pytest.mark.parametrize("lines", [0, 1, 10])
def test_a_short_run_still_has_its_page(tmp_path, lines, history):
    page = write_report(tmp_path, Content(history[:lines], {}, {}, {})).read_text()
    assert len(embedded(page)) == 2 * len(PLOTS)


def test_undefined_figures_of_a_single_class_are_shown_as_a_dash(tmp_path, images, history):
    seen = make_evaluation(np.array([0.1, 0.2]), np.zeros(2, int), np.array(["a", "b"]))
    index = write_report(tmp_path, Content(history, {"valid": seen}, {"valid": images}, {}))
    assert "-" in Page(index.read_text()).cells


def test_names_that_users_give_are_escaped(tmp_path, images):
    evil = '"><script>alert(1)</script>'
    seen = make_evaluation(np.array([0.9, 0.1]), np.array([0, 1]), np.array([evil, evil]))
    folder = tmp_path / "<b>$x" / "report"
    tables = {evil: [[evil, evil]]}
    content = Content([], {"valid": seen}, {"valid": images}, {"mode": evil}, tables)
    page = write_report(folder, content).read_text()
    assert "<script" not in page and "<b>" not in page and 'patch "' not in page
    assert Page(page).cells.count(evil) == 5


def test_the_roc_curve_has_the_interval_over_groups(evaluation):
    """It is in the summary alone, because DeLong's needs independent patches."""
    grouped = evaluation()
    grouped = dataclasses.replace(grouped, metrics=grouped.metrics | {"auc_ci95": None})
    found = write._with_interval(grouped, {"auc_ci95": [0.6, 0.7]})
    (text, *_) = plots.roc({"valid": found}, LIGHT).axes[0].get_legend().get_texts()
    assert "(95% CI 0.6000 to 0.7000)" in text.get_text()
