"""Plots of a run: learning curves, ROC, precision and recall, reliability.

Every plot is drawn for light and for dark screens; lines differ in colour and in their dashes, so
that none is told by its colour alone.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from bef_jax.scoring.metrics import Evaluation

RELIABILITY_BINS = 10
_SIZE = (5.4, 4.4)  # inches: two stand side by side on a desk, and one fills a phone
_DASHES = {"train": "-", "valid": "-", "test": (0, (5, 2))}


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; the lines have Okabe and Ito's, which the colour-blind tell apart."""

    paper: str
    ink: str
    grid: str
    splits: Mapping[str, str]

    def colour(self, split: str) -> str:
        """Returns the colour of a split's lines."""
        return self.splits.get(split, "#CC79A7")


LIGHT = Theme(
    "#ffffff", "#24292f", "#d8dee4", {"train": "#0072B2", "valid": "#D55E00", "test": "#009E73"}
)
# Their lighter blue and orange, with about twice the contrast of LIGHT's on dark paper.
DARK = Theme(
    "#161b22", "#d8dee4", "#30363d", {"train": "#56B4E9", "valid": "#E69F00", "test": "#009E73"}
)


def _figure(theme: Theme) -> Figure:
    # A Figure of its own, not pyplot's: no global state, no display.
    return Figure(_SIZE, facecolor=theme.paper, layout="constrained")


def _plot(theme: Theme, title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = _figure(theme)
    axes = figure.subplots()
    _style(axes, theme, title, x, y)
    return figure, axes


def _style(axes: Axes, theme: Theme, title: str, x: str, y: str) -> None:
    axes.set_facecolor(theme.paper)
    axes.set_title(title, color=theme.ink, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)
    axes.tick_params(colors=theme.ink, length=0, pad=6)
    axes.locator_params(axis="x", steps=[1, 2, 5, 10])  # halves of an epoch are read, quarters not
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _legend(axes: Axes, theme: Theme, **kwargs: Any) -> None:
    # matplotlib warns of a legend without entries.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9, **kwargs)


def loss(history: list[dict[str, Any]], theme: Theme) -> Figure:
    """Training loss, faint and smoothed, and the loss on valid."""
    figure, axes = _plot(theme, "Loss", "epoch", "cross-entropy, nats")
    epoch, train = _series(history, "loss")
    axes.plot(epoch, train, color=theme.colour("train"), linewidth=0.8, alpha=0.4)
    axes.plot(epoch, _smoothed(train), color=theme.colour("train"), linewidth=2, label="train")
    axes.plot(*_series(history, "valid_loss"), **_marked(theme), label="valid")
    _legend(axes, theme)
    return figure


def validation(history: list[dict[str, Any]], theme: Theme) -> Figure:
    """AUC and accuracy on valid."""
    figure, axes = _plot(theme, "Validation", "epoch", "")
    mark = _marked(theme)
    axes.plot(*_series(history, "valid_auc"), **mark, label="AUC")
    mark |= {"color": theme.ink, "marker": "s", "linestyle": "--", "linewidth": 1.4}
    axes.plot(*_series(history, "valid_accuracy"), **mark, label="accuracy")
    _legend(axes, theme, loc="lower right")
    return figure


def _marked(theme: Theme) -> dict[str, Any]:
    return {"color": theme.colour("valid"), "marker": "o", "markersize": 4, "linewidth": 2}


def _series(history: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the lines that have `key`, a value that is None as NaN (a gap)."""
    # A resumed run logs again the steps after its checkpoint: the last line of a step counts.
    lines = {line["step"]: line for line in history if key in line}
    points = [(lines[step]["epoch"], lines[step][key]) for step in sorted(lines)]
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    return epochs, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each point that is a fortieth of the curve, shorter at the ends."""
    half = len(values) // 80
    # Differences of one running sum, whatever the window. A NaN would reach all points after it; a
    # run ends before it logs one.
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def roc(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    """The receiver operating characteristic; a dot where the threshold lies."""
    x, y = "1 - specificity (false positive rate)", "sensitivity (true positive rate)"
    figure, axes = _plot(theme, "Receiver operating characteristic", x, y)
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
    for evaluation in evaluations.values():
        _roc_line(axes, evaluation, theme)
    # A little past the ends: else half of a line that runs along them is cut off.
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    _legend(axes, theme, loc="lower right")
    return figure


def _roc_line(axes: Axes, evaluation: Evaluation, theme: Theme) -> None:
    figures, line = evaluation.metrics, _line(evaluation, theme)
    if figures["auc"] is None:
        # An empty line: the legend says why there is none.
        axes.plot([], [], **line, label=f"{evaluation.split}: one class only, no curve")
        return
    label = f"{evaluation.split}: AUC {figures['auc']:.4f}"
    if figures["auc_ci95"]:
        label += "\n(95% CI {:.4f} to {:.4f})".format(*figures["auc_ci95"])
    false_positive, true_positive, _ = roc_curve(evaluation.labels, evaluation.probabilities)
    axes.plot(false_positive, true_positive, **line, label=label)
    # Where the threshold of the headline table lies.
    point = 1 - figures["specificity"], figures["sensitivity"]
    axes.plot(*point, "o", color=theme.colour(evaluation.split), markersize=7)


def _line(evaluation: Evaluation, theme: Theme) -> dict[str, Any]:
    dashes = _DASHES.get(evaluation.split, ":")
    return {"color": theme.colour(evaluation.split), "linestyle": dashes, "linewidth": 2}


def precision_recall(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    """Precision against recall; the dotted line is what guessing gives."""
    y = "precision (positive predictive value)"
    figure, axes = _plot(theme, "Precision and recall", "recall (sensitivity)", y)
    for evaluation in evaluations.values():
        _precision_recall_line(axes, evaluation, theme)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    _legend(axes, theme, loc="lower left")
    return figure


def _precision_recall_line(axes: Axes, evaluation: Evaluation, theme: Theme) -> None:
    average, line = evaluation.metrics["average_precision"], _line(evaluation, theme)
    if average is None:
        axes.plot([], [], **line, label=f"{evaluation.split}: no positive, no curve")
        return
    labels, probabilities = evaluation.labels, evaluation.probabilities
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    label = f"{evaluation.split}: average precision {average:.4f}"
    # In steps: between two thresholds precision is not linear in recall (Davis & Goadrich 2006),
    # and the area below steps is the average precision.
    axes.plot(recall, precision, drawstyle="steps-post", **line, label=label)
    axes.axhline(np.mean(labels), color=theme.ink, linewidth=0.8, linestyle=":")


def reliability(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    """How often what is called p is positive, in bins of p, and how many patches each has."""
    figure = _figure(theme)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _style(axes, theme, "Reliability", "", "share of positives")
    _style(counts, theme, "", "predicted probability", "patches")
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)
    for evaluation in evaluations.values():
        mean, share, number = bins(evaluation)
        line = _line(evaluation, theme)
        label = f"{evaluation.split}: ECE {evaluation.metrics['ece']:.4f}"
        axes.plot(mean, share, marker="o", markersize=5, **line, label=label)
        counts.stairs(number, edges, **line)
    _legend(axes, theme, loc="upper left")
    return figure


def bins(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability and share of positives of each bin, NaN where it is empty, and its count."""
    # A probability of 1 belongs to the last bin.
    which = np.minimum(
        (evaluation.probabilities * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1
    )
    count = np.bincount(which, minlength=RELIABILITY_BINS)
    # 0 / 0 is meant: the NaN of an empty bin leaves a gap in the line.
    with np.errstate(invalid="ignore"):
        mean, share = (
            np.bincount(which, weights=weights, minlength=RELIABILITY_BINS) / count
            for weights in (evaluation.probabilities, evaluation.labels)
        )
    return mean, share, count


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, in the colours of its theme."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=figure.get_facecolor())
    return buffer.getvalue()
