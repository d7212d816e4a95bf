"""Values in the plots of more than two classes, compared with scikit-learn or with a plain loop."""

import dataclasses
import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from bef_jax.report import multiclass_plots as plots
from bef_jax.report.theme import DARK, LIGHT, png
from tests.report.conftest import NAMES, make_many


def test_the_confusion_matrix_equals_scikit_learn_s():
    seen = make_many(n=400)
    called = seen.probabilities.argmax(axis=1)
    counts, names = plots.confusion_counts(seen)
    np.testing.assert_array_equal(counts, confusion_matrix(seen.labels, called))
    assert len(names) == len(set(names)) == len(NAMES)
    axes = plots.confusion(seen, LIGHT).axes[0]
    shares = confusion_matrix(seen.labels, called, normalize="true")
    np.testing.assert_allclose(axes.images[0].get_array(), shares)
    written = {(round(x), round(y)): text.get_text() for text in axes.texts
               for x, y in [text.get_position()]}  # fmt: skip
    assert written == {
        (column, row): f"{100 * share:.0f}"
        for (row, column), share in np.ndenumerate(shares)
        if share >= 0.005
    }


def test_classes_beyond_thirty_are_one_row():
    seen = make_many(n=4000, classes=tuple(f"class {i}" for i in range(50)))
    called = seen.probabilities.argmax(axis=1)
    counts, names = plots.confusion_counts(seen)
    assert len(names) == len(counts) == 30 and counts.sum() == 4000
    assert names[-1] == "21 others"
    mistakes = {f"class {i}": np.sum((seen.labels == i) & (called != i)) for i in range(50)}
    shown = set(names[:-1])
    assert min(mistakes[name] for name in shown) >= max(
        count for name, count in mistakes.items() if name not in shown
    )
    first, second = int(names[3].split()[1]), int(names[7].split()[1])
    assert counts[3, 7] == np.sum((seen.labels == first) & (called == second))
    others = np.array([f"class {label}" not in shown for label in seen.labels])
    assert counts[-1].sum() == others.sum()


def test_a_class_without_patches_has_an_empty_row():
    seen = make_many(n=400)
    absent = dataclasses.replace(seen, labels=np.where(seen.labels == 2, 0, seen.labels))
    image = plots.confusion(absent, LIGHT).axes[0].images[0]
    assert np.isnan(image.get_array().filled(np.nan)[2]).all()


def contrast(colour, other):
    """Returns the contrast of two colours by WCAG 2.2, written down once more."""

    def luminance(rgb):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted((luminance(to_rgb(colour)), luminance(to_rgb(other))))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_number_of_a_matrix_can_be_read_on_its_cell(theme):
    seen = make_many(n=400)
    axes = plots.confusion(seen, theme).axes[0]
    layer = axes.images[0]
    for text in axes.texts:
        column, row = map(round, text.get_position())
        below = layer.to_rgba(layer.get_array()[row, column])
        assert contrast(text.get_color(), below[:3]) > 3.8  # 21 is the most, 1 is invisible


def test_the_curves_are_those_of_each_class_against_the_rest():
    seen = make_many(n=300)
    axes = plots.roc(seen, LIGHT).axes[0]
    curves = [line for line in axes.lines if line.get_label()[0].isdigit()]
    assert len(curves) == len(NAMES)
    for number, line in enumerate(curves):
        is_class, probability = seen.labels == number, seen.probabilities[:, number]
        x, y, _ = roc_curve(is_class, probability)
        np.testing.assert_array_equal(line.get_xdata(), x)
        np.testing.assert_array_equal(line.get_ydata(), y)
        assert line.get_label().startswith(f"{roc_auc_score(is_class, probability):.4f} ")
    looks = {(line.get_color(), str(line.get_linestyle())) for line in curves}
    assert len(looks) == len(NAMES)
    # A legend leaves out what begins with "_", and reads dollars as a formula, unless told not to.
    texts = axes.get_legend().get_texts()
    assert len(texts) == len(NAMES) and not any(text.get_parse_math() for text in texts)


def test_of_many_classes_the_lowest_curves_are_shown():
    seen = make_many(n=2000, classes=tuple(f"class {i}" for i in range(25)))
    aucs = [roc_auc_score(seen.labels == i, seen.probabilities[:, i]) for i in range(25)]
    assert plots.lowest_auc(seen) == sorted(np.argsort(aucs)[:10].tolist())


def test_a_class_that_the_split_lacks_has_no_curve():
    seen = make_many(n=300)
    figures = {name: {"auc": None if name == "fat" else 0.5} for name in NAMES}
    seen = dataclasses.replace(seen, metrics={"per_class": figures})
    assert plots.lowest_auc(seen) == [1, 2, 3, 4]


def test_reliability_of_the_called_class_matches_scikit_learn():
    seen = make_many(n=500)
    right = seen.probabilities.argmax(axis=1) == seen.labels
    share, mean = calibration_curve(right, seen.probabilities.max(axis=1), n_bins=10)
    found_mean, found_share, count = plots.top_bins(seen)
    full = count > 0
    np.testing.assert_allclose(found_mean[full], mean)
    np.testing.assert_allclose(found_share[full], share)
    assert count.sum() == 500


@pytest.mark.filterwarnings("error")  # matplotlib warns about a letter that its font lacks
@pytest.mark.parametrize("classes", [NAMES, tuple(f"k{i}" * 20 for i in range(40))])
def test_every_plot_is_drawn_for_awkward_names(classes):
    seen = make_many(n=300, classes=classes)
    drawings = [
        plots.roc(seen, LIGHT),
        plots.confusion(seen, DARK),
        plots.reliability({"valid": seen, "test": make_many(split="test")}, DARK),
    ]
    for figure in drawings:
        assert Image.open(io.BytesIO(png(figure))).width > 600
