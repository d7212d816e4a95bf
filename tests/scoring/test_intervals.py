"""Intervals, compared with closed forms, scipy and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score

from bef_jax.scoring.intervals import bootstrap, intervals, wilson
from bef_jax.scoring.metrics import Evaluation, binary_metrics


def make_evaluation(n=300, seed=0, labels=None, threshold=0.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n) if labels is None else labels
    probabilities = 1 / (1 + np.exp(-(2.0 * labels - 1 + 1.5 * rng.normal(size=len(labels)))))
    metrics = binary_metrics(probabilities, labels, threshold)
    return Evaluation("valid", np.arange(len(labels)).astype(str), labels, probabilities, metrics)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (10, 10), (137, 400)])
def test_wilsons_interval_agrees_with_its_closed_form(successes, n):
    """Wilson 1927: the interval holds the proportions that a normal test at 5% does not reject."""
    z, share = stats.norm.ppf(0.975), successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert wilson(np.arange(n) < successes) == pytest.approx([centre - half, centre + half])


def test_bootstrap_of_a_mean_agrees_with_its_normal_interval():
    values = np.random.default_rng(1).exponential(size=2000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    expected = [values.mean() - half, values.mean() + half]
    assert bootstrap(np.mean, values) == pytest.approx(expected, abs=0.15 * half)


def test_bootstrap_agrees_with_scipy():
    evaluation = make_evaluation()
    samples = (evaluation.labels, evaluation.probabilities)
    theirs = stats.bootstrap(
        samples, average_precision_score, paired=True, vectorized=False, n_resamples=1000,
        method="percentile", rng=np.random.default_rng(3),
    )  # fmt: skip
    width = np.diff(theirs.confidence_interval)[0]
    expected = list(theirs.confidence_interval)
    assert bootstrap(average_precision_score, *samples) == pytest.approx(expected, abs=0.1 * width)


def test_bootstrap_of_a_figure_that_a_resample_leaves_undefined_is_none():
    values = np.arange(10)
    assert bootstrap(lambda x: x.mean() if 3 in x else None, values) is None


def test_one_normal_patch_is_enough_for_an_interval_and_one_metastasis_is_not():
    """Without a metastasis, a resample has no average precision."""
    labels = np.repeat([0, 1], [1, 30])
    low, high = intervals(make_evaluation(labels=labels))["average_precision"]
    assert 0.8 < low < high == 1.0
    assert intervals(make_evaluation(labels=1 - labels))["average_precision"] is None


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_each_interval_contains_its_figure(threshold):
    evaluation = make_evaluation(threshold=threshold)
    called = evaluation.probabilities >= threshold
    expected = {
        "accuracy": np.mean(called == evaluation.labels),
        "sensitivity": called[evaluation.labels == 1].mean(),
        "specificity": 1 - called[evaluation.labels == 0].mean(),
        "average_precision": average_precision_score(evaluation.labels, evaluation.probabilities),
        "f1": f1_score(evaluation.labels, called),
        "brier": brier_score_loss(evaluation.labels, evaluation.probabilities),
    }
    found = intervals(evaluation)
    assert found.keys() == expected.keys()
    for name, (low, high) in found.items():
        # The bounds of the width are those that are plausible for 300 patches.
        assert low < expected[name] < high and 0.01 < high - low < 0.2, name


def test_intervals_are_the_same_every_time():
    assert intervals(make_evaluation()) == intervals(make_evaluation())


def test_figures_of_a_missing_class_have_no_interval():
    found = intervals(make_evaluation(labels=np.zeros(50, int)))
    assert found["sensitivity"] is None
    assert found["average_precision"] is None
    assert found["specificity"] == found["accuracy"]
    assert wilson(np.array([], bool)) is None
