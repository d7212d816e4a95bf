"""Plots of a run: learning curves, ROC, precision and recall, reliability.

Every plot is drawn for light and for dark screens. Lines differ in colour, and also in their
dashes or markers, so that readers can tell them apart without seeing the colours.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from bef_jax.scoring.metrics import Evaluation, probability_bins

RELIABILITY_BINS = 10
_SIZE = (5.4, 4.4)  # inches: two fit side by side on a desktop screen, and one fills a phone
_DASHES = {"train": "-", "valid": "-", "test": (0, (5, 2))}


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; lines have Okabe and Ito's, which the colour-blind can tell apart."""

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
# Okabe and Ito's lighter blue and orange, with about twice the contrast of LIGHT's on dark paper.
DARK = Theme(
    "#161b22", "#d8dee4", "#30363d", {"train": "#56B4E9", "valid": "#E69F00", "test": "#009E73"}
)


def _figure(theme: Theme) -> Figure:
    # Do not use pyplot, because it has global state and may need a display.
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
    axes.locator_params(axis="x", steps=[1, 2, 5, 10])  # ticks at half epochs, not at quarters
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _legend(axes: Axes, theme: Theme, **kwargs: Any) -> None:
    # matplotlib warns about a legend without entries.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9, **kwargs)


def loss(history: list[dict[str, Any]], theme: Theme) -> Figure:
    """Plots the training loss, faint and smoothed, and the loss on valid."""
    figure, axes = _plot(theme, "Loss", "epoch", "cross-entropy, nats")
    epoch, train = _series(history, "loss")
    axes.plot(epoch, train, color=theme.colour("train"), linewidth=0.8, alpha=0.4)
    axes.plot(epoch, _smoothed(train), color=theme.colour("train"), linewidth=2, label="train")
    axes.plot(*_series(history, "valid_loss"), **_marked(theme), label="valid")
    _legend(axes, theme)
    return figure


def validation(history: list[dict[str, Any]], theme: Theme) -> Figure:
    """Plots the AUC and the accuracy on valid."""
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
    """Returns epochs and values of the lines that have `key`; None becomes NaN, which is a gap."""
    # A resumed run logs the steps after its checkpoint again, so the last line of a step counts.
    lines = {line["step"]: line for line in history if key in line}
    points = [(lines[step]["epoch"], lines[step][key]) for step in sorted(lines)]
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    return epochs, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Returns means over a window around each point: a fortieth of the curve, less at the ends."""
    half = len(values) // 80
    # Take differences of one running sum, so that a wide window costs no more. A NaN would reach
    # all points after it, but a run ends before it logs one.
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def roc(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    """Plots the receiver operating characteristic, with a dot at the threshold."""
    x, y = "1 - specificity (false positive rate)", "sensitivity (true positive rate)"
    figure, axes = _plot(theme, "Receiver operating characteristic", x, y)
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
    for evaluation in evaluations.values():
        _roc_line(axes, evaluation, theme)
    # Go a little past the ends, because half of a line along them would be cut off.
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    _legend(axes, theme, loc="lower right")
    return figure


def _roc_line(axes: Axes, evaluation: Evaluation, theme: Theme) -> None:
    figures, line = evaluation.metrics, _line(evaluation, theme)
    if figures["auc"] is None:
        # Plot an empty line, so that the legend says why there is no curve.
        axes.plot([], [], **line, label=f"{evaluation.split}: one class only, no curve")
        return
    label = f"{evaluation.split}: AUC {figures['auc']:.4f}"
    if figures["auc_ci95"]:
        label += "\n(95% CI {:.4f} to {:.4f})".format(*figures["auc_ci95"])
    false_positive, true_positive, _ = roc_curve(evaluation.labels, evaluation.probabilities)
    axes.plot(false_positive, true_positive, **line, label=label)
    # Mark the threshold of the headline table.
    point = 1 - figures["specificity"], figures["sensitivity"]
    axes.plot(*point, "o", color=theme.colour(evaluation.split), markersize=7)


def _line(evaluation: Evaluation, theme: Theme) -> dict[str, Any]:
    dashes = _DASHES.get(evaluation.split, ":")
    return {"color": theme.colour(evaluation.split), "linestyle": dashes, "linewidth": 2}


def precision_recall(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    """Plots precision against recall; the dotted line is the result of guessing."""
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
    # Draw steps, because between two thresholds precision is not linear in recall (Davis & Goadrich
    # 2006). The area below the steps is the average precision.
    axes.plot(recall, precision, drawstyle="steps-post", **line, label=label)
    axes.axhline(np.mean(labels), color=theme.ink, linewidth=0.8, linestyle=":")


def reliability(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    """Plots the share of positives in bins of the probability, and the patches of each bin."""
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
    """Returns each bin's mean probability and share of positives (NaN if empty), and its count."""
    which = probability_bins(evaluation.probabilities, RELIABILITY_BINS)
    count = np.bincount(which, minlength=RELIABILITY_BINS)
    # 0 / 0 is intended, because the NaN of an empty bin leaves a gap in the line.
    with np.errstate(invalid="ignore"):
        mean, share = (
            np.bincount(which, weights=weights, minlength=RELIABILITY_BINS) / count
            for weights in (evaluation.probabilities, evaluation.labels)
        )
    return mean, share, count


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file, in the colours of its theme."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=figure.get_facecolor())
    return buffer.getvalue()
