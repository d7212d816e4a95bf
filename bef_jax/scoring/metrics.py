"""Figures that judge a set of predictions: exact, in float64, on the host.

Those of more than two classes are in `multiclass`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from bef_jax.data.patch import PCAM_CLASSES

ECE_BINS = 15  # as in Guo et al. 2017


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation of a split, in the split's order.

    Attributes:
        split: the split's name.
        ids: str array [N].
        labels: integer array [N], numbers of classes.
        probabilities: float array, [N] of class 1, or [N, K] for K > 2 classes.
        metrics: what `multiclass.metrics_of` returns for them.
        plain: the same as `probabilities`, but of the unchanged patches, where `probabilities` are
            averages over several views.
        classes: the names of the K classes, in the order of their numbers.
        groups: str array [N], what patches of one slide or patient share; None if it is not known.
    """

    split: str
    ids: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    metrics: dict[str, Any]
    plain: np.ndarray | None = None
    classes: tuple[str, ...] = PCAM_CLASSES
    groups: np.ndarray | None = None


def binary_metrics(
    probabilities: np.ndarray, labels: np.ndarray, threshold: float = 0.5
) -> dict[str, Any]:
    """Returns the metrics of probabilities of class 1 against labels.

    Args:
        probabilities: float [N], of class 1.
        labels: [N], 0 or 1.
        threshold: a probability of at least this much counts as class 1.

    Returns:
        n, loss (cross-entropy in nats), accuracy, auc, auc_ci95 ([low, high], DeLong),
        average_precision, sensitivity, specificity, f1, brier, ece (15 equal bins) and threshold,
        as plain Python numbers. A figure that is not defined, such as the AUC of a single class, is
        None.

    Raises:
        ValueError: no samples, unequal lengths, labels outside {0, 1} or probabilities outside
            [0, 1], which includes NaN.
    """
    probabilities = np.asarray(probabilities, np.float64)
    labels = np.asarray(labels)
    _check(probabilities, labels)
    positive = labels == 1
    return {
        "n": labels.size,
        "loss": cross_entropy(probabilities, labels),
        **_of_decisions(probabilities >= threshold, positive),
        **_of_ranking(probabilities, positive),
        "brier": brier(probabilities, positive),
        "ece": float(weighted_calibration_error(probabilities, positive)(np.ones(labels.size))),
        "threshold": float(threshold),
    }


def delong_interval(
    probabilities: np.ndarray, labels: np.ndarray, level: float = 0.95
) -> list[float] | None:
    """Returns DeLong's confidence interval [low, high] of the AUC, clipped to [0, 1].

    It is computed from midranks (Sun and Xu, 2014), in O(N log N), and is exact under ties.

    Args:
        probabilities: float [N].
        labels: [N], 0 or 1.
        level: coverage of the interval.

    Returns:
        The interval. None where a class has fewer than two samples, because its variance is not
        defined; or where all samples have one probability, because nothing is ranked.
    """
    positive = np.asarray(labels) == 1
    if min(positive.sum(), (~positive).sum()) < 2 or np.ptp(probabilities) == 0:
        return None
    of_positives, of_negatives = structural_components(probabilities, positive)
    half = NormalDist().inv_cdf(0.5 + level / 2) * delong_error(of_positives, of_negatives)
    # A normal interval has no bounds: near an AUC of 1 it would go past 1.
    return [float(np.clip(of_positives.mean() + side, 0, 1)) for side in (-half, half)]


def _check(probabilities: np.ndarray, labels: np.ndarray) -> None:
    if probabilities.ndim != 1 or probabilities.shape != labels.shape or not labels.size:
        raise ValueError(
            f"metrics need [N] probabilities and labels, not {probabilities.shape}, {labels.shape}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("metrics need labels of 0 or 1")
    # This form of the check also fails for NaN.
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("metrics need probabilities in [0, 1]")


def _of_ranking(probabilities: np.ndarray, positive: np.ndarray) -> dict[str, Any]:
    # With one class only, there is no pair to rank.
    if positive.all() or not positive.any():
        return dict.fromkeys(("auc", "auc_ci95", "average_precision"))
    of_positives, _ = structural_components(probabilities, positive)
    return {
        "auc": float(of_positives.mean()),
        "auc_ci95": delong_interval(probabilities, positive),
        "average_precision": average_precision(probabilities, positive),
    }


def structural_components(
    probabilities: np.ndarray, positive: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns DeLong's structural components of the AUC, which is the mean of either; float64.

    Args:
        probabilities: float [N].
        positive: bool [N], with samples of both classes.

    Returns:
        of_positives: for each positive, the share of negatives below it, [positives].
        of_negatives: for each negative, the share of positives above it, [negatives]. Ties count
            half.
    """
    # Imported here, because scipy.stats is slow, and the first training step should not wait.
    from scipy.stats import rankdata

    # [N], midranks. A sample's rank among all, minus its rank in its own class, is the number of
    # the other class below it. This sorts, because PCam's test split has some 268 million pairs.
    probabilities = np.asarray(probabilities, np.float64)
    ranks = rankdata(probabilities)
    own_positive = rankdata(probabilities[positive])
    own_negative = rankdata(probabilities[~positive])
    of_positives = (ranks[positive] - own_positive) / own_negative.size
    of_negatives = 1 - (ranks[~positive] - own_negative) / own_positive.size
    return of_positives, of_negatives


def delong_error(of_positives: np.ndarray, of_negatives: np.ndarray) -> float:
    """Returns DeLong's standard error of the AUC, from its structural components.

    Given the differences of two models' components, it returns the standard error of the difference
    of their AUCs.

    Args:
        of_positives: float64 [positives], two at least; see `structural_components`.
        of_negatives: float64 [negatives], two at least.
    """
    variances = (x.var(ddof=1) / x.size for x in (of_positives, of_negatives))
    return np.sqrt(sum(variances))


def average_precision(probabilities: np.ndarray, positive: np.ndarray) -> float | None:
    """Returns the average precision, as scikit-learn defines it; None without a positive.

    Args:
        probabilities: float [N].
        positive: bool [N].
    """
    if not positive.any():
        return None
    return float(weighted_ranking(probabilities, positive)(np.ones(len(positive), int))[1])


def f1(called: np.ndarray, positive: np.ndarray) -> float | None:
    """Returns the F1 of decisions, bool [N]; None if nothing is positive or called positive."""
    return _ratio(2 * np.sum(called & positive), called.sum() + positive.sum())


def brier(probabilities: np.ndarray, positive: np.ndarray) -> float:
    """Returns the mean squared error of probabilities, float [N]."""
    return float(np.mean((probabilities - positive) ** 2))


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean cross-entropy in nats, from `probabilities`, [N] of class 1 or [N, K]."""
    return float(losses(probabilities, labels).mean())


def losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the cross-entropy of each patch in nats, float64 [N]; see `cross_entropy`."""
    if probabilities.ndim == 1:
        right = np.where(labels == 1, probabilities, 1 - probabilities)
    else:
        right = probabilities[np.arange(labels.size), labels]
    # A softmax that saturates gives exactly 0 or 1. The clip keeps one such patch from making the
    # mean infinite: a confident mistake costs some 36 nats.
    return -np.log(np.clip(right, np.finfo(np.float64).eps, 1))


def _of_decisions(predicted: np.ndarray, positive: np.ndarray) -> dict[str, float | None]:
    true_positive = np.sum(predicted & positive)
    true_negative = np.sum(~predicted & ~positive)
    return {
        "accuracy": _ratio(true_positive + true_negative, positive.size),
        "sensitivity": _ratio(true_positive, positive.sum()),
        "specificity": _ratio(true_negative, (~positive).sum()),
        "f1": f1(predicted, positive),
    }


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def probability_bins(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Returns the bin of each probability, 0 ... count - 1; all bins have the same width."""
    # A probability of 1 belongs to the last bin.
    return np.minimum((probabilities * count).astype(int), count - 1)


# ---- figures of a weighted sample ---------------------------------------------------------------

# A resample of a bootstrap says how often each patch is drawn: integer weights, [N]. A function of
# this type returns a figure of a resample, or NaN where it is not defined. The patches are sorted
# only once, so that a resample costs a few passes over N numbers.
OfWeights = Callable[[np.ndarray], float]


def weighted_auc(probabilities: np.ndarray, positive: np.ndarray) -> OfWeights:
    """Returns the function that gives the AUC of a resample.

    Args:
        probabilities: float [N].
        positive: bool [N].
    """
    counts = _weighted_counts(probabilities, positive)
    return lambda weights: _auc(*counts(weights), weights.sum())


def weighted_ranking(
    probabilities: np.ndarray, positive: np.ndarray
) -> Callable[[np.ndarray], tuple[float, float]]:
    """Returns the function that gives the AUC and the average precision of a resample.

    Both come from the same sums, which are most of their cost. See `weighted_auc`.
    """
    counts = _weighted_counts(probabilities, positive)
    # Each positive's tie among the positives, which come in falling order, ends at this place.
    falling = -np.sort(-probabilities[positive])
    tie_end = np.searchsorted(-falling, -falling, "right") - 1

    def figures(weights: np.ndarray) -> tuple[float, float]:
        drawn, above, to_ties = counts(weights)
        auc = _auc(drawn, above, to_ties, weights.sum())
        hits = np.cumsum(drawn)
        if not hits.size or not hits[-1]:
            return auc, np.nan
        # None may be called so far, but then the positive is not drawn either. A product with @
        # would start the threads of BLAS, which cost more than they save.
        precision = hits[tie_end] / np.maximum(to_ties, 1)
        return auc, np.sum(drawn * precision) / hits[-1]

    return figures


def _weighted_counts(
    probabilities: np.ndarray, positive: np.ndarray
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns the function that counts, for each positive, the samples of a resample above it.

    It returns integers [positives], from the highest probability to the lowest: how often the
    positive is drawn, how many samples are above it, and how many are above it or tied with it.
    """
    order = np.argsort(-probabilities, kind="stable")
    falling = -probabilities[order]
    positives = order[positive[order]]
    # The first and the last place of each positive's tie, and who has the first place.
    first = np.searchsorted(falling, -probabilities[positives])
    last = np.searchsorted(falling, -probabilities[positives], "right") - 1
    leaders = order[first]

    def counts(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total = weights.take(order)
        np.cumsum(total, out=total)  # in place, because new memory costs more than the sum
        return weights[positives], total[first] - weights[leaders], total[last]

    return counts


def _auc(drawn: np.ndarray, above: np.ndarray, to_ties: np.ndarray, n: int) -> float:
    """Returns the AUC of a resample of n samples from its `_weighted_counts`; NaN of one class."""
    count = drawn.sum()
    # Ties count half. Among themselves, positives lose half of their pairs.
    lost = drawn @ (above + to_ties) - count**2
    pairs = 2 * count * (n - count)
    return (pairs - lost) / pairs if pairs else np.nan


def weighted_calibration_error(probabilities: np.ndarray, right: np.ndarray) -> OfWeights:
    """Returns the function that gives the expected calibration error of a resample.

    A bin's gap is the distance between its mean probability and its share of patches that are
    right. The error is the mean of the gaps, weighted by the bins' counts.

    Args:
        probabilities: float [N].
        right: bool [N], whether what the probability is of came true.
    """
    bins, gaps = probability_bins(probabilities, ECE_BINS), probabilities - right

    def figure(weights: np.ndarray) -> float:
        # The sum of gaps is a bin's gap times its count, so no empty bin divides by 0.
        of_bins = np.bincount(bins, weights * gaps, minlength=ECE_BINS)
        return np.abs(of_bins).sum() / weights.sum()

    return figure
