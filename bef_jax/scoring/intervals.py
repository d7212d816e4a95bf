"""95% confidence intervals of the figures of `metrics` and `multiclass`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bef_jax.scoring.metrics import Evaluation, weighted_ranking
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
    threshold = evaluation.metrics["threshold"]
    called = probabilities >= threshold
    found = resampled(_binary_figures(probabilities, positive, threshold), positive.size, None)
    return {
        "accuracy": wilson(called == positive),
        "sensitivity": wilson(called[positive]),
        "specificity": wilson(~called[~positive]),
        # A resample that leaves one of these undefined leaves it without an interval. Other
        # intervals may lack a few resamples (`interval_of`), because they can give a `reason`.
        **{
            name: None if np.isnan(found[name]).any() else interval_of(found[name])
            for name in ("average_precision", "f1", "brier")
        },
    }


def wilson(successes: np.ndarray) -> list[float] | None:
    """Returns Wilson's interval [low, high] of a proportion, from bool [N]; None if N is 0."""
    # Imported here so that the first training step does not wait for it.
    from scipy.stats import binomtest

    if not len(successes):
        return None
    found = binomtest(int(np.sum(successes)), len(successes)).proportion_ci(LEVEL, "wilson")
    return [float(found.low), float(found.high)]


# ---- resamples ----------------------------------------------------------------------------------


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
    cells, squares = 2 * positive + called, (probabilities - positive) ** 2
    ranking = weighted_ranking(probabilities, positive)
    has_both = 0 < positive.sum() < positive.size

    def figures(weights: np.ndarray) -> Figures:
        auc, precision = ranking(weights)
        n, weights = weights.sum(), weights.astype(float)  # once, not in each of these sums
        rejected, false_calls, misses, hits = np.bincount(cells, weights, 4)
        positives, negatives = hits + misses, rejected + false_calls
        with np.errstate(invalid="ignore"):  # 0 / 0 gives NaN, as it should
            return {
                "accuracy": (hits + rejected) / n,
                "sensitivity": hits / positives,
                "specificity": rejected / negatives,
                "average_precision": precision if has_both else np.nan,
                "f1": 2 * hits / (hits + false_calls + positives),
                # A product with @ would start the threads of BLAS; see `weighted_ranking`.
                "brier": np.sum(weights * squares) / n,
                "auc": auc,
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
    rng = np.random.default_rng(0)
    units = None if groups is None else np.unique(groups, return_inverse=True)[1]
    count = size if units is None else units.max() + 1
    for _ in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, count, count), minlength=count)
        yield drawn if units is None else drawn[units]


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
