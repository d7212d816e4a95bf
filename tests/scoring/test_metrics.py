"""Metrics, compared with scikit-learn, and with brute force over all pairs of patches."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics as sklearn_metrics

from bef_jax.scoring.metrics import (
    average_precision,
    binary_metrics,
    delong_interval,
    f1,
    structural_components,
    weighted_auc,
    weighted_calibration_error,
    weighted_ranking,
)
from tests.scoring.test_paired_tests import brute_force_delong


def predictions(n=400, seed=0, decimals=None):
    """Returns probabilities that partly predict the labels, and the labels; rounding makes ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    probabilities = 1 / (1 + np.exp(-(2 * labels - 1 + 1.5 * rng.normal(size=n))))
    return probabilities if decimals is None else probabilities.round(decimals), labels


def brute_force_interval(probabilities, labels):
    # One probability for all has an AUC of a half, which is certain.
    difference, error = brute_force_delong(probabilities, np.zeros(len(labels)), labels)
    auc, half = 0.5 + difference, norm.ppf(0.975) * error
    return [max(0.0, auc - half), min(1.0, auc + half)]


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_metrics_agree_with_scikit_learn(decimals, threshold):
    probabilities, labels = predictions(decimals=decimals)
    found = binary_metrics(probabilities, labels, threshold)
    called = probabilities >= threshold
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels, called),
        "auc": sklearn_metrics.roc_auc_score(labels, probabilities),
        "average_precision": sklearn_metrics.average_precision_score(labels, probabilities),
        "sensitivity": sklearn_metrics.recall_score(labels, called),
        "specificity": sklearn_metrics.recall_score(labels, called, pos_label=0),
        "f1": sklearn_metrics.f1_score(labels, called),
        "brier": sklearn_metrics.brier_score_loss(labels, probabilities),
        "loss": sklearn_metrics.log_loss(labels, probabilities),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert (found["n"], found["threshold"]) == (400, threshold)


@pytest.mark.parametrize("decimals", [None, 2, 1, 0])
@pytest.mark.parametrize("n", [2, 9, 400])
def test_average_precision_is_scikit_learns(n, decimals):
    for seed in range(20):
        probabilities, labels = predictions(n, seed, decimals)
        labels[0] = 1  # scikit-learn gives 0 where nothing is positive, and warns
        expected = sklearn_metrics.average_precision_score(labels, probabilities)
        found = average_precision(probabilities, labels == 1)
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("value", [True, False])
def test_average_precision_and_f1_of_one_class(value):
    probabilities, positive = np.array([0.2, 0.3, 0.9]), np.full(3, value)
    assert average_precision(probabilities, positive) == (1.0 if value else None)
    assert f1(positive, positive) == (1.0 if value else None)
    assert f1(~positive, positive) == 0.0


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("n", [8, 60, 150])
def test_interval_agrees_with_delongs_formula(n, decimals):
    probabilities, labels = predictions(n, seed=n, decimals=decimals)
    expected = brute_force_interval(probabilities, labels)
    assert delong_interval(probabilities, labels) == pytest.approx(expected, abs=1e-12)
    assert binary_metrics(probabilities, labels)["auc_ci95"] == pytest.approx(expected, abs=1e-12)


def test_interval_covers_the_true_auc():
    rng = np.random.default_rng(0)
    true_auc = norm.cdf(1 / np.sqrt(2))  # two unit Gaussians whose means are 1 apart
    labels = np.repeat([0, 1], 60)
    intervals = [delong_interval(norm.cdf(rng.normal(labels)), labels) for _ in range(1000)]
    covered = np.mean([low <= true_auc <= high for low, high in intervals])
    assert 0.93 <= covered <= 0.97  # 0.95 within three standard errors of 1,000 draws


def test_interval_is_clipped_and_widens_with_its_level():
    probabilities, labels = np.array([0.1, 0.6, 0.4, 0.9]), np.array([0, 0, 1, 1])
    assert delong_interval(probabilities, labels)[1] == 1.0
    assert delong_interval(probabilities, 1 - labels)[0] == 0.0
    probabilities, labels = predictions()
    narrow, wide = (delong_interval(probabilities, labels, level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_calibration_error_agrees_with_a_loop_over_bins():
    probabilities, labels = predictions()
    expected = 0
    for k in range(15):
        inside = (probabilities >= k / 15) & (probabilities < (k + 1) / 15)
        if inside.any():
            gap = abs(labels[inside].mean() - probabilities[inside].mean())
            expected += inside.sum() / 400 * gap
    assert binary_metrics(probabilities, labels)["ece"] == pytest.approx(expected)


def test_the_last_bin_of_the_calibration_error_includes_1():
    # Both lie in [14/15, 1], where 1.95 positives are predicted and one is found.
    assert binary_metrics([0.95, 1.0], [1, 0])["ece"] == pytest.approx(0.95 / 2)


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_a_weight_counts_as_so_many_copies_of_a_patch(decimals):
    for seed in range(20):
        probabilities, labels = predictions(60, seed, decimals)
        positive, weights = labels == 1, np.random.default_rng(seed).poisson(1, 60)
        copies = np.repeat(probabilities, weights), np.repeat(labels, weights)
        auc = weighted_auc(probabilities, positive)(weights)
        assert auc == pytest.approx(sklearn_metrics.roc_auc_score(*copies[::-1]))
        both = weighted_ranking(probabilities, positive)(weights)
        assert both[0] == auc
        assert both[1] == pytest.approx(sklearn_metrics.average_precision_score(*copies[::-1]))
        error = weighted_calibration_error(probabilities, positive)(weights)
        assert error == pytest.approx(binary_metrics(*copies)["ece"])


def test_weights_that_leave_one_class_leave_figures_undefined():
    probabilities, labels = predictions(60)
    positive = labels == 1
    for weights in (labels, 1 - labels):
        assert np.isnan(weighted_auc(probabilities, positive)(weights))
    ranking = weighted_ranking(probabilities, positive)
    assert np.isnan(ranking(labels)[0]) and ranking(labels)[1] == 1
    assert np.isnan(ranking(1 - labels)).all()


def test_a_probability_at_the_threshold_is_positive():
    assert binary_metrics([0.5, 0.4], [1, 0], threshold=0.5)["accuracy"] == 1.0


def test_saturated_mistake_has_a_finite_loss():
    assert binary_metrics([0.0, 1.0], [1, 1])["loss"] == pytest.approx(
        -np.log(np.finfo(np.float64).eps) / 2
    )


def test_one_probability_for_all_has_an_auc_of_a_half():
    found = binary_metrics([0.3] * 6, [0, 1, 0, 1, 0, 1])
    assert found["auc"] == 0.5
    assert found["auc_ci95"] is None


@pytest.mark.parametrize("label", [0, 1])
def test_metrics_that_one_class_leaves_undefined_are_none(label):
    found = binary_metrics([0.2, 0.3, 0.9], [label] * 3)
    assert found["auc"] is None and found["auc_ci95"] is None
    assert found["average_precision"] is None
    assert found["specificity" if label else "sensitivity"] is None
    assert found["accuracy"] == pytest.approx(1 / 3 if label else 2 / 3)


@pytest.mark.parametrize("labels", [[0, 0, 1], [0, 1, 1]])
def test_a_class_of_one_patch_has_no_interval(labels):
    found = binary_metrics([0.2, 0.3, 0.9], labels)
    assert (found["auc"], found["auc_ci95"]) == (1.0, None)


@pytest.mark.parametrize("decimals", [None, 1])
def test_both_classes_components_have_the_auc_as_their_mean(decimals):
    probabilities, labels = predictions(decimals=decimals)
    for components in structural_components(probabilities, labels == 1):
        assert components.mean() == pytest.approx(
            sklearn_metrics.roc_auc_score(labels, probabilities)
        )


def test_float32_scores_the_same_as_its_value_in_float64():
    probabilities, labels = predictions()
    narrow = probabilities.astype(np.float32)
    assert binary_metrics(narrow, labels) == binary_metrics(narrow.astype(np.float64), labels)


def test_metrics_are_plain_numbers_of_python():
    probabilities, labels = predictions()
    found = binary_metrics(probabilities.astype(np.float32), labels.astype(np.uint8))
    flat = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in found.values())
    assert {type(value) for value in flat} <= {int, float}


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([], [], "need \\[N\\]"),
        ([0.5], [0, 1], "need \\[N\\]"),
        ([0.5, 0.5], [0, 2], "labels of 0 or 1"),
        ([0.5, np.nan], [0, 1], "probabilities in"),
        ([0.5, 1.01], [0, 1], "probabilities in"),
    ],
)
def test_arrays_that_cannot_be_scored_are_refused(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        binary_metrics(np.array(probabilities, float), np.array(labels, int))
