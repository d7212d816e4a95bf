"""Figures of more than two classes: exact, in float64, on the host.

A patch is decided to be of the class with the largest probability. Means over classes (macro) are
over the classes that the split has, because the others have no sensitivity, AUC or F1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bef_jax.scoring.metrics import (
    OfWeights,
    binary_metrics,
    losses,
    weighted_auc,
    weighted_calibration_error,
)

PER_CLASS = ("auc", "sensitivity", "specificity")  # each class against the rest
# A confusion matrix has a number for each pair of classes. Beyond so many classes, a summary, which
# is one line of JSON, would have more than a million of them.
_LARGEST_CONFUSION = 1000

# Figures of a resample by name: numbers, and "per_class", [3, K] in the order of PER_CLASS.
Figures = dict[str, float | np.ndarray]


def metrics_of(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], threshold: float = 0.5
) -> dict[str, Any]:
    """Returns `binary_metrics` or `multiclass_metrics`, according to the number of classes.

    Args:
        probabilities: float, [N] of class 1, or [N, K] for K > 2 classes.
        labels: [N], numbers of classes.
        classes: their names.
        threshold: for two classes: a probability of at least this much counts as class 1.
    """
    if len(classes) == 2:
        return binary_metrics(probabilities, labels, threshold)
    return multiclass_metrics(probabilities, labels, classes)


def multiclass_metrics(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    """Returns the metrics of probabilities of K classes against labels.

    Args:
        probabilities: float [N, K]; each row sums to 1.
        labels: [N], 0 ... K - 1.
        classes: the names of the K classes.

    Returns:
        Plain Python numbers: n, loss (cross-entropy in nats), accuracy, balanced_accuracy (mean
        sensitivity), auc (mean over classes of one against the rest), macro_f1, brier (mean over
        patches of the sum over classes of squared errors, Brier 1950, so at most 2), ece (of the
        largest probability, 15 equal bins, Guo et al. 2017), per_class (auc, sensitivity and
        specificity by the class's name) and confusion (rows are true classes, columns are
        decisions; None for more than 1,000 classes). Keys that only two classes have are None. So
        are auc_ci95, which `evaluator.summarise` fills in, and a figure that is not defined, such
        as the AUC of a class that the split lacks.

    Raises:
        ValueError: no samples, arrays that do not fit, labels outside 0 ... K - 1, or rows that are
            no probabilities, which includes NaN.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    _check(probabilities, labels, len(classes))
    found = weighted_figures(probabilities, labels)(np.ones(labels.size, int))
    per_class = by_class(classes, [[number_of(x) for x in row] for row in found.pop("per_class")])
    names = ("auc_ci95", "sensitivity", "specificity", "f1", "average_precision", "threshold")
    return {
        "n": labels.size,
        **{name: number_of(value) for name, value in found.items()},
        **dict.fromkeys(names),
        "per_class": per_class,
        "confusion": _confusion(probabilities, labels),
    }


def _check(probabilities: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if probabilities.shape != (labels.size, classes) or labels.ndim != 1 or not labels.size:
        raise ValueError(
            f"metrics need [N, {classes}] probabilities and [N] labels, not {probabilities.shape}, "
            f"{labels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"metrics need whole labels from 0 to {classes - 1}")
    # This form of the checks also fails for NaN.
    if not (probabilities >= 0).all() or not np.allclose(probabilities.sum(axis=1), 1):
        raise ValueError("metrics need probabilities in [0, 1] that sum to 1")


def weighted_figures(
    probabilities: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], Figures]:
    """Returns the function that gives all figures of a resample of patches, by name.

    It takes the weights of a resample, integers [N]. A call takes some 0.2 ms for each class of
    32,768 patches, most of it for the AUC. A figure that is not defined is NaN.

    Args:
        probabilities: float64 [N, K].
        labels: [N], 0 ... K - 1.
    """
    called = probabilities.argmax(axis=1)
    right = called == labels
    loss, squares = losses(probabilities, labels), _squared_errors(probabilities, labels)
    calibration_error = weighted_calibration_error(probabilities.max(axis=1), right)
    class_aucs = weighted_class_aucs(probabilities, labels)
    rates = _weighted_rates(called, labels, probabilities.shape[1])
    macro = _macro_mean(labels, probabilities.shape[1])

    def figures(weights: np.ndarray) -> Figures:
        aucs, (sensitivity, specificity, f1) = class_aucs(weights), rates(weights)
        n, weights = weights.sum(), weights.astype(float)  # once, not in each of these products
        # weights @ loss would start the threads of BLAS, which cost more than they save.
        return {
            "loss": np.sum(weights * loss) / n,
            "accuracy": np.sum(weights * right) / n,
            "balanced_accuracy": macro(sensitivity),
            "auc": macro(aucs),
            "macro_f1": macro(f1),
            "brier": np.sum(weights * squares) / n,
            "ece": calibration_error(weights),
            "per_class": np.stack([aucs, sensitivity, specificity]),
        }

    return figures


def weighted_macro_auc(probabilities: np.ndarray, labels: np.ndarray) -> OfWeights:
    """Returns the function that gives the AUC of a resample; that of K > 2 classes is macro.

    Args:
        probabilities: float, [N] of class 1, or [N, K].
        labels: [N], numbers of classes.
    """
    if probabilities.ndim == 1:
        return weighted_auc(probabilities, labels == 1)
    class_aucs = weighted_class_aucs(probabilities, labels)
    macro = _macro_mean(labels, probabilities.shape[1])
    return lambda weights: macro(class_aucs(weights))


def weighted_class_aucs(
    probabilities: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function that gives the AUC of each class against the rest, float64 [K]."""
    aucs = [weighted_auc(column, labels == k) for k, column in enumerate(probabilities.T)]
    return lambda weights: np.array([auc(weights) for auc in aucs])


def _weighted_rates(
    called: np.ndarray, labels: np.ndarray, classes: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function that gives each class's sensitivity, specificity and F1, [3, K]."""
    # Patches of one class that have one decision count alike, so few numbers are left to sort.
    pairs, pair_of = np.unique(labels.astype(int) * classes + called, return_inverse=True)
    label, call = np.divmod(pairs, classes)

    def rates(weights: np.ndarray) -> np.ndarray:
        counts = np.bincount(pair_of, weights, len(pairs))
        hits = np.bincount(label, counts * (label == call), classes)
        actual, calls = (np.bincount(x, counts, classes) for x in (label, call))
        others = weights.sum() - actual
        with np.errstate(invalid="ignore"):  # 0 / 0 gives NaN, as it should
            sensitivity, specificity = hits / actual, (others - (calls - hits)) / others
            # A class without patches has no F1, even if some are called to be of it.
            f1 = np.where(actual, 2 * hits / (actual + calls), np.nan)
        return np.stack([sensitivity, specificity, f1])

    return rates


def _macro_mean(labels: np.ndarray, classes: int) -> OfWeights:
    """Returns the function that takes the mean, over the classes that the split has, of [K].

    If a resample lacks one of them, the mean is NaN and not the mean of the others, which would be
    another figure.
    """
    present = np.bincount(labels, minlength=classes) > 0
    return lambda values: values[present].mean()


def _squared_errors(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    errors = probabilities.copy()
    errors[np.arange(labels.size), labels] -= 1
    return (errors**2).sum(axis=1)


def _confusion(probabilities: np.ndarray, labels: np.ndarray) -> list[list[int]] | None:
    classes = probabilities.shape[1]
    if classes > _LARGEST_CONFUSION:
        return None
    cells = labels.astype(int) * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).tolist()


def by_class(classes: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Returns {class: {figure: value}} from the rows of the figures PER_CLASS, [3][K]."""
    columns = zip(classes, *rows, strict=True)
    return {name: dict(zip(PER_CLASS, values, strict=True)) for name, *values in columns}


def number_of(value: float) -> float | None:
    """Returns a figure as a number of Python; NaN, which JSON lacks, becomes None."""
    return None if np.isnan(value) else float(value)
