"""Paired tests, compared with brute force, with sums by hand and with scikit-learn's AUC."""

import functools

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


# ---- groups, and more than two classes ----------------------------------------------------------

FEW = 150  # resamples of the comparisons with loops, which call scikit-learn for each
macro_auc = functools.partial(roc_auc_score, multi_class="ovr")


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr("bef_jax.scoring.intervals.RESAMPLES", FEW)


def two_models_of_classes(n=200, better=0.0):
    """Returns probabilities of three classes by two models [N, 3] each, and the labels."""
    rng = np.random.default_rng(0)
    labels, shared = rng.integers(0, 3, n), rng.normal(size=(n, 3))
    logits = [
        (1 + extra) * np.eye(3)[labels] + shared + 0.7 * rng.normal(size=(n, 3))
        for extra in (better, 0.0)
    ]
    return *(np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in logits), labels


def brute_force_interval(first, second, labels, groups):
    rng, names = np.random.default_rng(0), sorted(set(groups))
    differences = []
    for _ in range(FEW):
        drawn = rng.integers(0, len(names), len(names))
        rows = np.concatenate([np.flatnonzero(groups == names[number]) for number in drawn])
        of_first, of_second = (macro_auc(labels[rows], x[rows]) for x in (first, second))
        differences.append(of_first - of_second)
    return list(np.percentile(differences, [2.5, 97.5]))


@pytest.mark.parametrize("make", [two_models, two_models_of_classes])
@pytest.mark.parametrize("better", [0.0, 1.0])
def test_the_difference_is_resampled_by_groups(make, better, few_resamples):
    first, second, labels = make(better=better)
    groups = np.array([f"{row % 23:02}" for row in range(200)])
    found = paired_tests(first, second, labels, 0.5, groups)
    expected = macro_auc(labels, first) - macro_auc(labels, second)
    assert found["auc_difference"] == pytest.approx(expected)
    ends = brute_force_interval(first, second, labels, groups)
    assert found["auc_difference_ci95"] == pytest.approx(ends)
    assert (ends[0] > 0) == (better > 0)
    # Both would need independent patches.
    assert (found["delong_p"], found["mcnemar_p"]) == (None, None)


def test_classes_without_groups_are_compared_patch_by_patch(few_resamples):
    first, second, labels = two_models_of_classes(better=1.0)
    found = paired_tests(first, second, labels, 0.5)
    ids = np.array([f"{row:03}" for row in range(200)])
    ends = brute_force_interval(first, second, labels, ids)
    assert found["auc_difference_ci95"] == pytest.approx(ends)
    assert found["delong_p"] is None
    right = [x.argmax(axis=1) == labels for x in (first, second)]
    assert found | mcnemar_test(*right) == found
    assert found["only_first_right"] > found["only_second_right"]


def test_the_interval_of_classes_agrees_with_delongs_where_both_hold():
    first, second, labels = two_models(n=600, better=0.3, decimals=9)
    groups = np.array([f"{row:03}" for row in range(600)])
    resampled = paired_tests(first, second, labels, 0.5, groups)["auc_difference_ci95"]
    closed = paired_tests(first, second, labels, 0.5)["auc_difference_ci95"]
    assert resampled == pytest.approx(closed, abs=0.15 * np.ptp(closed))


def test_patches_of_one_patient_give_a_difference_without_an_interval():
    found = paired_tests(*two_models_of_classes(), 0.5, np.full(200, "patient 1"))
    assert found["auc_difference"] is not None
    assert found["auc_difference_ci95"] is None
