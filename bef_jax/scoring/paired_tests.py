"""Tests of two models on the same patches: is one better by more than chance?"""

import numpy as np

from bef_jax.scoring.intervals import LEVEL, interval_of, resampled
from bef_jax.scoring.metrics import delong_error, structural_components
from bef_jax.scoring.multiclass import number_of, weighted_macro_auc


def paired_tests(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    groups: np.ndarray | None = None,
) -> dict:
    """Returns tests of the AUCs and of the decisions of two models, as entries of a summary.

    DeLong's test is for two classes, and both his and McNemar's need independent patches. So an
    entry of theirs is None where it does not hold, and the interval is by resampling.

    Args:
        first: float, probabilities by one model, [N] of class 1, or [N, K] for K > 2 classes.
        second: the same by another model, for the same patches in the same order.
        labels: [N], numbers of classes.
        threshold: for two classes: a probability of at least this much counts as class 1.
        groups: str [N], what patches of one slide or patient share; None if it is not known.

    Returns:
        auc_difference (first minus second; macro for K > 2), auc_difference_ci95, delong_p,
        mcnemar_p, and the numbers of patches only_first_right and only_second_right. An undefined
        value is None.
    """
    of_decisions = mcnemar_test(*(_right(x, labels, threshold) for x in (first, second)))
    if groups is not None:
        of_decisions["mcnemar_p"] = None
    if first.ndim == 1 and groups is None:
        return delong_test(first, second, labels) | of_decisions
    return bootstrap_test(first, second, labels, groups) | of_decisions


def _right(probabilities: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    if probabilities.ndim == 1:
        return (probabilities >= threshold) == (labels == 1)
    return probabilities.argmax(axis=1) == labels


def bootstrap_test(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, groups: np.ndarray | None
) -> dict:
    """Returns the difference of two AUCs of the same patches, and its bootstrap interval.

    Both models see the same resamples, of patches or of groups (`intervals.resamples`). There is no
    p-value: the AUCs differ at the level of 5 % where the interval lacks 0.
    """
    aucs = [weighted_macro_auc(x, labels) for x in (first, second)]

    def difference(weights: np.ndarray) -> dict[str, float]:
        of_first, of_second = (auc(weights) for auc in aucs)
        return {"auc": of_first - of_second}

    found = resampled(difference, labels.size, groups)["auc"]
    return {
        "auc_difference": number_of(difference(np.ones(labels.size, int))["auc"]),
        "auc_difference_ci95": interval_of(found),
        "delong_p": None,
    }


def delong_test(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict:
    """Tests the difference of two AUCs of the same patches (DeLong et al. 1988, eq. 7).

    All values are None if a class has fewer than two patches.
    """
    from scipy.stats import norm

    positive = np.asarray(labels) == 1
    if min(positive.sum(), (~positive).sum()) < 2:
        return dict.fromkeys(("auc_difference", "auc_difference_ci95", "delong_p"))
    # [positives] and [negatives]: how much better the first model places each patch.
    components = (structural_components(x, positive) for x in (first, second))
    of_positives, of_negatives = (
        of_first - of_second for of_first, of_second in zip(*components, strict=True)
    )
    # This is the error of the mean of the differences, so there is no covariance to add.
    error = delong_error(of_positives, of_negatives)
    difference, half = of_positives.mean(), norm.ppf(0.5 + LEVEL / 2) * error
    if error:
        p = 2 * norm.sf(abs(difference) / error)
    elif difference == 0:  # both models rank all patches alike, so they certainly do not differ
        p = 1.0
    else:  # one model places all patches better by the same share, so it certainly is better
        p = 0.0
    return {
        "auc_difference": float(difference),
        "auc_difference_ci95": [float(difference - half), float(difference + half)],
        "delong_p": float(p),
    }


def mcnemar_test(first_right: np.ndarray, second_right: np.ndarray) -> dict:
    """Runs McNemar's exact test of two models' decisions, from bool [N] each (McNemar 1947)."""
    from scipy.stats import binomtest

    only_first = int(np.sum(first_right & ~second_right))
    only_second = int(np.sum(~first_right & second_right))
    differing = only_first + only_second
    # The test is exact, not by chi-squared, because two good models may differ on few patches. If
    # they differ on none, there is nothing to test, and binomtest would refuse.
    return {
        "only_first_right": only_first,
        "only_second_right": only_second,
        "mcnemar_p": float(binomtest(only_first, differing).pvalue) if differing else 1.0,
    }
