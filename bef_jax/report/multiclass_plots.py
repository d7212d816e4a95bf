"""Plots of a run with more than two classes: ROC, confusion matrix, reliability."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from sklearn.metrics import roc_curve

from bef_jax.report.plots import draw_bins, in_bins
from bef_jax.report.theme import Theme, legend, new_figure, plot, style
from bef_jax.scoring.class_names import drawn_names
from bef_jax.scoring.metrics import Evaluation

MOST_LINES = 10  # curves of one plot: five colours, with full and with broken lines
MOST_ROWS = 30  # of a confusion matrix
_MOST_WITH_NUMBERS = 20  # rows of a matrix whose cells still have room for a number
# Okabe and Ito's, those with enough contrast on each paper; the fifth is the ink.
_LIGHT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_DARK_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")


def roc(evaluation: Evaluation, theme: Theme) -> Figure:
    """Plots the ROC of each class against the rest; of many classes, those with the lowest AUC."""
    title = f"ROC, each class against the rest: {evaluation.split}"
    if len(evaluation.classes) > MOST_LINES:
        title = f"ROC, {MOST_LINES} lowest of {len(evaluation.classes):,} AUCs: {evaluation.split}"
    x, y = "1 - specificity (false positive rate)", "sensitivity (true positive rate)"
    figure, axes = plot(theme, title, x, y)
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
    names = drawn_names(evaluation.classes)
    for line, number in enumerate(lowest_auc(evaluation)):
        _roc_line(axes, evaluation, theme, line, number, names[number])
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    legend(axes, theme, loc="lower right")
    return figure


def lowest_auc(evaluation: Evaluation) -> list[int]:
    """Returns the numbers of the classes whose curves are shown, in the order of their numbers."""
    figures = evaluation.metrics["per_class"]
    defined = [
        number for number, name in enumerate(evaluation.classes) if figures[name]["auc"] is not None
    ]
    defined.sort(key=lambda number: figures[evaluation.classes[number]]["auc"])
    return sorted(defined[:MOST_LINES])


def _roc_line(
    axes: Axes, evaluation: Evaluation, theme: Theme, line: int, number: int, name: str
) -> None:
    probabilities = evaluation.probabilities[:, number]
    false_positive, true_positive, _ = roc_curve(evaluation.labels == number, probabilities)
    auc = evaluation.metrics["per_class"][evaluation.classes[number]]["auc"]
    colours = (*_colours(theme), theme.ink)
    axes.plot(
        false_positive,
        true_positive,
        color=colours[line % len(colours)],
        linestyle="-" if line < len(colours) else (0, (4, 2)),
        linewidth=1.6,
        # The figure comes first, because a legend leaves out labels that begin with a "_".
        label=f"{auc:.4f} {name}",
    )


def _colours(theme: Theme) -> tuple[str, ...]:
    return _DARK_COLOURS if _luminance(to_rgb(theme.paper)) < 0.5 else _LIGHT_COLOURS


# ---- confusion ----------------------------------------------------------------------------------


def confusion(evaluation: Evaluation, theme: Theme) -> Figure:
    """Plots the share of each class that was called each class, as a matrix of colours."""
    counts, names = confusion_counts(evaluation)
    totals = counts.sum(axis=1, keepdims=True)
    # A class without a patch has a row of NaN, which stays empty.
    shares = np.divide(counts, totals, where=totals > 0, out=np.full(counts.shape, np.nan))
    side = max(4.4, 2 + 0.36 * len(names))  # inches
    figure = new_figure(theme, (side + 1.2, side))
    axes = figure.subplots()
    style(axes, theme, f"Confusion: {evaluation.split}", "called", "class (patches)")
    axes.grid(False)
    colours = LinearSegmentedColormap.from_list("share", [theme.paper, _colours(theme)[0]])
    # By the root of the share, because most mistakes are a few per cent, and would hardly show.
    layer = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=1))
    _name_cells(axes, names, totals[:, 0])
    if len(names) <= _MOST_WITH_NUMBERS:
        _write_shares(layer, shares, theme)
    bar = figure.colorbar(layer, ax=axes, shrink=0.6)
    bar.set_label("share of the class", color=theme.ink)
    bar.ax.tick_params(colors=theme.ink, length=0)
    bar.outline.set_visible(False)
    return figure


def confusion_counts(evaluation: Evaluation) -> tuple[np.ndarray, list[str]]:
    """Returns how many patches of each class were called each class, and names for the matrix.

    Of more than 30 classes, those with the most mistakes have a row and a column each, and all
    others are one class.

    Returns:
        counts: int [n, n]; rows are true classes, and columns are called classes.
        names: n of them.
    """
    names = drawn_names(evaluation.classes)
    labels, called = evaluation.labels, evaluation.probabilities.argmax(axis=1)
    place = np.arange(len(names))  # the row of each class
    if len(names) > MOST_ROWS:
        wrong = np.bincount(labels[labels != called], minlength=len(names))
        shown = np.sort(np.argsort(-wrong, kind="stable")[: MOST_ROWS - 1])
        place = np.full(len(names), len(shown))
        place[shown] = np.arange(len(shown))
        names = [names[number] for number in shown] + [f"{len(names) - len(shown):,} others"]
    n = len(names)
    counts = np.bincount(place[labels] * n + place[called], minlength=n * n).reshape(n, n)
    return counts, names


def _name_cells(axes: Axes, names: list[str], totals: np.ndarray) -> None:
    options = {"fontsize": 9, "parse_math": False}
    places = range(len(names))
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(places, names, **options, **(slant if max(map(len, names)) > 3 else {}))
    rows = [f"{name} ({total:,})" for name, total in zip(names, totals, strict=True)]
    axes.set_yticks(places, rows, **options)


def _write_shares(layer: AxesImage, shares: np.ndarray, theme: Theme) -> None:
    """Writes each share as a percentage into its cell, except those that round to 0."""
    for row, column in np.argwhere(shares >= 0.005):
        share = shares[row, column]
        below = layer.to_rgba(share)
        colour = max((theme.paper, theme.ink), key=lambda text: _contrast(text, below))
        options = {"color": colour, "fontsize": 8, "ha": "center", "va": "center"}
        layer.axes.text(column, row, f"{100 * share:.0f}", **options)


def _contrast(colour: Any, other: Any) -> float:
    """Returns the contrast of two colours, from 1 to 21 (WCAG 2.2)."""
    low, high = sorted(_luminance(to_rgb(each)) for each in (colour, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(rgb: tuple[float, float, float]) -> float:
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


# ---- reliability --------------------------------------------------------------------------------


def reliability(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    """Plots how often the called class is right, in bins of its probability."""
    x, y = "probability of the called class", "share that is right"
    return draw_bins(evaluations, theme, top_bins, x, y, "lower right")


def top_bins(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each bin's mean probability of the called class, and the share that is right.

    The third array is the number of patches of each bin; an empty bin has NaN in the others.
    """
    called = evaluation.probabilities.argmax(axis=1)
    return in_bins(evaluation.probabilities.max(axis=1), called == evaluation.labels)
