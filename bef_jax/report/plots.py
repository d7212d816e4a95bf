"""Plots of a run: learning curves, ROC, precision and recall, reliability.

Lines differ in colour, and also in their dashes or markers, so that readers can tell them apart
without seeing the colours.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from bef_jax.report.theme import Theme, legend, new_figure, plot, style
from bef_jax.scoring.metrics import Evaluation, probability_bins

RELIABILITY_BINS = 10
_DASHES = {"train": "-", "valid": "-", "test": (0, (5, 2))}


def loss(history: list[dict[str, Any]], theme: Theme) -> Figure:
    """Plots the training loss, faint and smoothed, and the loss on valid."""
    figure, axes = plot(theme, "Loss", "epoch", "cross-entropy, nats")
    epoch, train = _series(history, "loss")
    axes.plot(epoch, train, color=theme.colour("train"), linewidth=0.8, alpha=0.4)
    axes.plot(epoch, _smoothed(train), color=theme.colour("train"), linewidth=2, label="train")
    axes.plot(*_series(history, "valid_loss"), **_marked(theme), label="valid")
    legend(axes, theme)
    return figure


def validation(history: list[dict[str, Any]], theme: Theme) -> Figure:
    """Plots the AUC and the accuracy on valid."""
    figure, axes = plot(theme, "Validation", "epoch", "")
    mark = _marked(theme)
    axes.plot(*_series(history, "valid_auc"), **mark, label="AUC")
    mark |= {"color": theme.ink, "marker": "s", "linestyle": "--", "linewidth": 1.4}
    axes.plot(*_series(history, "valid_accuracy"), **mark, label="accuracy")
    legend(axes, theme, loc="lower right")
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
    figure, axes = plot(theme, "Receiver operating characteristic", x, y)
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
    for evaluation in evaluations.values():
        _roc_line(axes, evaluation, theme)
    # Go a little past the ends, because half of a line along them would be cut off.
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    legend(axes, theme, loc="lower right")
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
    figure, axes = plot(theme, "Precision and recall", "recall (sensitivity)", y)
    for evaluation in evaluations.values():
        _precision_recall_line(axes, evaluation, theme)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    legend(axes, theme, loc="lower left")
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
    return draw_bins(evaluations, theme, bins, "predicted probability", "share of positives")


def draw_bins(
    evaluations: Mapping[str, Evaluation],
    theme: Theme,
    bins_of: Callable[[Evaluation], tuple[np.ndarray, np.ndarray, np.ndarray]],
    x: str,
    y: str,
    corner: str = "upper left",
) -> Figure:
    """Plots the second array of `bins_of` against the first, and below them the counts.

    Args:
        bins_of: returns what `in_bins` returns.
        x: name of the axis of probabilities.
        y: name of the axis of shares.
        corner: where the legend is.
    """
    figure = new_figure(theme)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    style(axes, theme, "Reliability", "", y)
    style(counts, theme, "", x, "patches")
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)
    for evaluation in evaluations.values():
        mean, share, number = bins_of(evaluation)
        line = _line(evaluation, theme)
        label = f"{evaluation.split}: ECE {evaluation.metrics['ece']:.4f}"
        axes.plot(mean, share, marker="o", markersize=5, **line, label=label)
        counts.stairs(number, edges, **line)
    legend(axes, theme, loc=corner)
    return figure


def bins(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each bin's mean probability and share of positives (NaN if empty), and its count."""
    return in_bins(evaluation.probabilities, evaluation.labels)


def in_bins(
    probabilities: np.ndarray, outcomes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each bin's mean probability and mean outcome (NaN if empty), and its count.

    Args:
        probabilities: float [N].
        outcomes: [N], 0 or 1.
    """
    which = probability_bins(probabilities, RELIABILITY_BINS)
    count = np.bincount(which, minlength=RELIABILITY_BINS)
    # 0 / 0 is intended, because the NaN of an empty bin leaves a gap in the line.
    with np.errstate(invalid="ignore"):
        mean, share = (
            np.bincount(which, weights=weights, minlength=RELIABILITY_BINS) / count
            for weights in (probabilities, outcomes)
        )
    return mean, share, count
