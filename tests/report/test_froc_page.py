"""The page and the plot of FROC, without slides."""

import numpy as np
import pytest

from bef_jax.report.froc_page import FrocContent, draw_froc, write_froc_page
from bef_jax.report.theme import DARK, LIGHT
from tests import chromium

RATES = ("0.25", "0.5", "1", "2", "4", "8")
SUMMARY = {
    "froc": 0.6, "froc_ci95": [0.5, 0.7], "sensitivity": dict.fromkeys(RATES, 0.6),
    "slide_auc": 0.9, "slide_auc_ci95": [0.8, 1.0], "n_slides": 12, "n_tumour_slides": 5,
    "n_lesions": 1, "n_itc": 1, "confusion": None, "reasons": {},
}  # fmt: skip
LESION = {"slide": "<i>a", "lesion": 1, "longest_axis_um": 1234.5, "itc": False,
          "probability": 0.75, "false_positives": 0.5}  # fmt: skip


def content(**changes):
    points = np.array([[0, 0], [0, 0.5], [1, 0.6], [3, 0.6]])
    band = np.array([[0, 0.3, 0.7], [1, 0.5, 0.7], [8, 0.5, 0.7]])
    lesions = [LESION, LESION | {"itc": True, "probability": None, "false_positives": None}]
    return FrocContent("<b>run", SUMMARY | changes, points, band, lesions, ("<u>x",))


def drawn(theme=LIGHT, **changes):
    axes = draw_froc(content(**changes), theme).axes[0]
    return axes, [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_plot_marks_the_six_rates():
    axes, texts = drawn()
    line, marks = axes.get_lines()
    np.testing.assert_array_equal(marks.get_xdata(), [0.25, 0.5, 1, 2, 4, 8])
    np.testing.assert_array_equal(marks.get_ydata(), [0.6] * 6)
    x, y = line.get_data()
    np.testing.assert_allclose(y[np.isclose(x, 0.5)], 0.55)  # linear in false positives
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(RATES)
    assert texts == ["score 0.600\n(95% CI 0.500 to 0.700)"]


def test_without_lesions_the_plot_says_why():
    none = {"froc": None, "froc_ci95": None, "sensitivity": dict.fromkeys(RATES)}
    for theme in (LIGHT, DARK):
        _, texts = drawn(theme, **none, reasons={"froc": "no slide has a lesion"})
        assert texts == ["no slide has a lesion"]


def test_the_page_escapes_names_and_has_all_figures(tmp_path):
    text = write_froc_page(tmp_path, content()).read_text()
    assert "<b>run" not in text and "<i>a" not in text and "<u>x" not in text
    for words in ("0.6000 (0.5000 to 0.7000)", "0.9000 (0.8000 to 1.0000)", "1,234", "0.7500",
                  "not found", "ITC", "0.807", "72.4%", "only if it is of the same",
                  "does not say which class"):  # fmt: skip
        assert words in text, words
    confusion = {true: dict.fromkeys(("none", "ITC", "micro", "macro"), 7) for true in
                 ("none", "ITC", "micro", "macro")}  # fmt: skip
    text = write_froc_page(tmp_path, content(confusion=confusion)).read_text()
    assert "called macro" in text and text.count("<td>7</td>") == 16


@pytest.mark.slow
@pytest.mark.skipif(chromium.find() is None, reason="no chromium here (apt install chromium)")
def test_the_page_in_a_browser(tmp_path):
    page = write_froc_page(tmp_path, content())
    with chromium.open_tab(tmp_path / "profile") as tab:
        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light")):
            tab.open(page, width, scheme)
            widths = tab.value("[document.documentElement.scrollWidth, innerWidth]")
            assert widths[0] <= widths[1] == width
            assert tab.value("document.images[0].decode().then(() => true)")
        assert tab.events_named("Log.entryAdded") == []
