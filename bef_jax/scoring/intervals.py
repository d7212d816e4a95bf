"""95% confidence intervals of the figures of `metrics` and `multiclass`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bef_jax.scoring.metrics import (
    Evaluation,
    average_precision,
    brier,
    f1,
    weighted_auc,
    weighted_average_precision,
)
from bef_jax.scoring.multiclass import (
    Figures,
    by_class,
    weighted_figures,
    weighted_macro_auc,
)

LEVEL = 0.95
RESAMPLES = 1000  # so that each end of a percentile interval rests on 25 of them
ONE_GROUP = "the split has one group only, and an interval needs two at least"
RARE_CLASS = "more than 2.5 % of the resamples lack a class"


def intervals(evaluation: Evaluation) -> dict[str, Any]:
    """Returns intervals [low, high] of figures, by name; None where one is not defined.

    For two classes without groups, six figures have one here, and `metrics` has that of the AUC.
    Accuracy, sensitivity and specificity are proportions and have Wilson's interval. Average
    precision, f1 and brier have a bootstrap interval over patches. A patch counts as one sample,
    although patches of one slide are alike. So figures vary more between slides than this says.
    ECE has no interval: resampling adds noise to every bin, so its bootstrap lies above the figure.

    With groups, or more than two classes, it is `resampled_intervals` that decides.
    """
    if not _has_independent_pairs(evaluation):
        return resampled_intervals(evaluation)
    probabilities, positive = evaluation.probabilities, evaluation.labels == 1
    called = probabilities >= evaluation.metrics["threshold"]
    has_both = 0 < positive.sum() < positive.size
    return {
        "accuracy": wilson(called == positive),
        "sensitivity": wilson(called[positive]),
        "specificity": wilson(~called[~positive]),
        "average_precision": bootstrap(average_precision, probabilities, positive)
        if has_both
        else None,
        "f1": bootstrap(f1, called, positive),
        "brier": bootstrap(brier, probabilities, positive),
    }


def wilson(successes: np.ndarray) -> list[float] | None:
    """Returns Wilson's interval [low, high] of a proportion, from bool [N]; None if N is 0."""
    # Imported here so that the first training step does not wait for it.
    from scipy.stats import binomtest

    if not len(successes):
        return None
    found = binomtest(int(np.sum(successes)), len(successes)).proportion_ci(LEVEL, "wilson")
    return [float(found.low), float(found.high)]


def bootstrap(figure: Callable[..., float | None], *samples: np.ndarray) -> list[float] | None:
    """Returns the percentile interval [low, high] of `figure(*samples)`, the same at every call.

    Args:
        figure: a function that takes arrays [N] and returns a number, or None where undefined.
        samples: those arrays. A resample takes the same rows of each.

    Returns:
        The interval, or None where a resample leaves the figure undefined.
    """
    n, rng = len(samples[0]), np.random.default_rng(0)
    draws = (rng.integers(0, n, n) for _ in range(RESAMPLES))
    # NumPy turns None into NaN.
    found = np.array([figure(*(sample[rows] for sample in samples)) for rows in draws], float)
    tail = 50 * (1 - LEVEL)
    ends = np.percentile(found, [tail, 100 - tail])
    return ends.tolist() if np.isfinite(ends).all() else None


# ---- groups, and more than two classes ----------------------------------------------------------


def _has_independent_pairs(evaluation: Evaluation) -> bool:
    """Returns whether DeLong's interval holds: for two classes of patches without groups."""
    return len(evaluation.classes) == 2 and evaluation.groups is None


def auc_interval(evaluation: Evaluation) -> list[float] | None:
    """Returns the interval [low, high] of the AUC: DeLong's where it holds, else a bootstrap's."""
    if _has_independent_pairs(evaluation):
        return evaluation.metrics["auc_ci95"]
    labels, groups = evaluation.labels, evaluation.groups
    auc = weighted_macro_auc(evaluation.probabilities, labels)
    found = resampled(lambda weights: {"auc": auc(weights)}, labels.size, groups)
    return interval_of(found["auc"])


def resampled_intervals(evaluation: Evaluation) -> dict[str, Any]:
    """Returns bootstrap intervals [low, high] of all figures, by name; None where undefined.

    A resample draws patches with replacement. Where there are groups, it draws groups, each with
    all of its patches. So the intervals say how figures vary from patient to patient, as those of
    DeLong and Wilson cannot, because they need independent patches. With few groups they are too
    short. Nine classes of 32,768 patches take some two seconds.

    Returns:
        For two classes: the figures of `intervals`, and auc. For more: loss, accuracy,
        balanced_accuracy, auc, macro_f1, brier, ece and per_class, {class: {figure: interval}}.
        Where there are groups, `resampled` is "groups". `reason` says why intervals are None.
    """
    probabilities, labels = evaluation.probabilities, evaluation.labels
    if len(evaluation.classes) == 2:
        figures = _binary_figures(probabilities, labels == 1, evaluation.metrics["threshold"])
    else:
        figures = weighted_figures(probabilities, labels)
    found = resampled(figures, labels.size, evaluation.groups)
    if "ece" in found:
        # Resampling adds noise to every bin, so that the bootstrap of this error lies above it.
        shifted = found["ece"] - found["ece"].mean() + evaluation.metrics["ece"]
        found["ece"] = np.maximum(shifted, 0)
    block = {name: _block_of(name, values, evaluation.classes) for name, values in found.items()}
    if evaluation.groups is not None:
        block["resampled"] = "groups"
    if evaluation.groups is not None and _is_one(evaluation.groups):
        block["reason"] = ONE_GROUP
    elif None in block.values():
        block["reason"] = RARE_CLASS
    return block


def _binary_figures(
    probabilities: np.ndarray, positive: np.ndarray, threshold: float
) -> Callable[[np.ndarray], Figures]:
    """Returns the function that gives the figures of a resample; see `weighted_figures`."""
    called = probabilities >= threshold
    right, hit, squares = called == positive, called & positive, (probabilities - positive) ** 2
    auc = weighted_auc(probabilities, positive)
    precision = weighted_average_precision(probabilities, positive)
    has_both = 0 < positive.sum() < positive.size

    def figures(weights: np.ndarray) -> Figures:
        n, positives, calls = weights.sum(), weights @ positive, weights @ called
        rights, hits = weights @ right, weights @ hit
        with np.errstate(invalid="ignore"):  # 0 / 0 gives NaN, as it should
            return {
                "accuracy": rights / n,
                "sensitivity": hits / positives,
                "specificity": (rights - hits) / (n - positives),
                "average_precision": precision(weights) if has_both else np.nan,
                "f1": 2 * hits / (calls + positives),
                "brier": np.sum(weights * squares) / n,
                "auc": auc(weights),
            }

    return figures


def _block_of(name: str, values: np.ndarray, classes: Sequence[str]) -> Any:
    if name != "per_class":
        return interval_of(values)
    # values are [RESAMPLES, figures, classes]
    rows = [[interval_of(of_class) for of_class in row.T] for row in values.swapaxes(0, 1)]
    return by_class(classes, rows)


def resampled(
    figures: Callable[[np.ndarray], Figures], size: int, groups: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Returns the figures of all resamples by name, float64 [RESAMPLES, ...].

    They are NaN if all patches are of one group, because all resamples are then the same.

    Args:
        figures: takes the weights of a resample, integers [N].
        size: the number of patches, N.
        groups: str [N], or None.
    """
    if groups is not None and _is_one(groups):
        return {
            name: np.full((1, *np.shape(value)), np.nan)
            for name, value in figures(np.ones(size, int)).items()
        }
    found = [figures(weights) for weights in resamples(size, groups)]
    return {name: np.array([each[name] for each in found], float) for name in found[0]}


def _is_one(groups: np.ndarray) -> bool:
    return bool((groups == groups[0]).all())


def resamples(size: int, groups: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yields the weights of RESAMPLES resamples, int [N]: how often each patch is drawn.

    They are the same at every call. A resample draws as many groups as there are, each with all of
    its patches. Without groups, each patch is one of its own.
    """
    units = np.arange(size) if groups is None else np.unique(groups, return_inverse=True)[1]
    count, rng = units.max() + 1, np.random.default_rng(0)
    for _ in range(RESAMPLES):
        yield np.bincount(rng.integers(0, count, count), minlength=count)[units]


def interval_of(values: np.ndarray) -> list[float] | None:
    """Returns the percentile interval [low, high] of a figure of all resamples, [RESAMPLES].

    A resample that leaves the figure undefined (NaN) could have any value. So it counts as below
    the low end and as above the high end. There is no interval, None, if more than 2.5 % do.
    """
    tail, undefined = 50 * (1 - LEVEL), np.isnan(values)
    with np.errstate(invalid="ignore"):  # the mean of two infinite values
        low = np.percentile(np.where(undefined, -np.inf, values), tail)
        high = np.percentile(np.where(undefined, np.inf, values), 100 - tail)
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None
