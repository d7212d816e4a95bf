"""Paired tests, compared with brute force, with sums by hand and with scikit-learn's AUC."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from bef_jax.scoring.paired_tests import delong_test, mcnemar_test, paired_tests


def two_models(n=200, seed=0, better=0.0, decimals=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    shared = rng.normal(size=n)
    first, second = (
        stats.norm.cdf((1 + extra) * labels - 0.5 + shared + 0.7 * rng.normal(size=n))
        for extra in (better, 0.0)
    )
    return first.round(decimals), second.round(decimals), labels


def brute_force_delong(first, second, labels):
    """Returns the AUCs' difference and its standard error, as in DeLong et al. 1988."""

    def components(scores):
        above, below = scores[labels == 1][:, None], scores[labels == 0][None]
        wins = (above > below) + 0.5 * (above == below)
        return wins.mean(axis=1), wins.mean(axis=0)

    by_positive, by_negative = (
        np.stack(parts) for parts in zip(components(first), components(second), strict=True)
    )
    covariance = np.cov(by_positive) / by_positive.shape[1]
    covariance += np.cov(by_negative) / by_negative.shape[1]
    contrast = np.array([1, -1])
    variance = contrast @ covariance @ contrast
    difference = contrast @ by_positive.mean(axis=1)
    return difference, np.sqrt(variance)


@pytest.mark.parametrize("decimals", [1, 6])
@pytest.mark.parametrize("better", [0.0, 0.5])
def test_delongs_test_agrees_with_the_formula_of_1988(better, decimals):
    first, second, labels = two_models(better=better, decimals=decimals)
    difference, error = brute_force_delong(first, second, labels)
    found = delong_test(first, second, labels)
    expected = roc_auc_score(labels, first) - roc_auc_score(labels, second)
    assert found["auc_difference"] == pytest.approx(difference) == pytest.approx(expected)
    assert found["delong_p"] == pytest.approx(2 * stats.norm.sf(abs(difference / error)))
    half = stats.norm.ppf(0.975) * error
    ends = [difference - half, difference + half]
    assert found["auc_difference_ci95"] == pytest.approx(ends)


def test_one_in_twenty_pairs_of_equal_models_is_significant():
    found = [delong_test(*two_models(seed=seed, decimals=9))["delong_p"] for seed in range(400)]
    # The tolerance is about three standard errors of 400 draws.
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.085


def test_models_with_the_same_ranking_do_not_differ():
    first, _, labels = two_models()
    found = delong_test(first, first / 2, labels)
    assert (found["auc_difference"], found["delong_p"]) == (0.0, 1.0)


def test_a_certain_difference_has_a_p_value_of_0():
    """One model ranks all positives first, the other model ranks them last."""
    first, labels = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])
    found = delong_test(first, 1 - first, labels)
    assert (found["auc_difference"], found["delong_p"]) == (1.0, 0.0)


def test_labels_of_one_class_give_no_difference():
    found = delong_test(np.array([0.1, 0.2]), np.array([0.3, 0.1]), np.array([1, 1]))
    assert set(found.values()) == {None}


def test_mcnemars_test_agrees_with_a_sum_by_hand():
    """The first model is right in two of ten disagreements: p = 2 * (1 + 10 + 45) / 2^10."""
    first = np.array([True] * 2 + [False] * 8 + [True] * 30)
    second = np.array([False] * 2 + [True] * 8 + [True] * 30)
    found = mcnemar_test(first, second)
    assert (found["only_first_right"], found["only_second_right"]) == (2, 8)
    assert found["mcnemar_p"] == pytest.approx(2 * 56 / 1024)
    assert mcnemar_test(first, first)["mcnemar_p"] == 1.0


def test_decisions_are_taken_at_the_threshold():
    first, second, labels = np.array([0.6, 0.2]), np.array([0.8, 0.2]), np.array([1, 0])
    assert paired_tests(first, second, labels, 0.7)["only_second_right"] == 1
    assert paired_tests(first, second, labels, 0.5)["only_second_right"] == 0
