"""Intervals, compared with closed forms, scipy and scikit-learn, and with loops over resamples."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    recall_score,
    roc_auc_score,
)

from bef_jax.scoring.intervals import (
    ONE_GROUP,
    auc_interval,
    interval_of,
    intervals,
    resampled,
    resamples,
    wilson,
)
from bef_jax.scoring.metrics import Evaluation, binary_metrics
from bef_jax.scoring.multiclass import multiclass_metrics
from tests.scoring.test_multiclass import NAMES, predictions


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
    found = resampled(lambda weights: {"mean": weights @ values / weights.sum()}, 2000, None)
    assert interval_of(found["mean"]) == pytest.approx(expected, abs=0.15 * half)


def test_the_interval_of_average_precision_agrees_with_scipys():
    evaluation = make_evaluation()
    theirs = stats.bootstrap(
        (evaluation.labels, evaluation.probabilities), average_precision_score, paired=True,
        vectorized=False, n_resamples=1000, method="percentile", rng=np.random.default_rng(3),
    )  # fmt: skip
    width = np.diff(theirs.confidence_interval)[0]
    expected = list(theirs.confidence_interval)
    found = intervals(evaluation)["average_precision"]
    assert found == pytest.approx(expected, abs=0.1 * width)


# What version 0.1.0 gave for `make_evaluation(300)`, and for probabilities rounded to tenths,
# before it counted how often each patch is drawn: it sorted the rows of each resample again.
FORMER = {
    17: {
        "average_precision": [0.8043730322714941, 0.9158181449422597],
        "f1": [0.7739621446664792, 0.8651767527432814],
        "brier": [0.12536357045390323, 0.1733218420087832],
    },
    1: {
        "average_precision": [0.794071956636237, 0.9041752403199215],
        "f1": [0.7696680870150258, 0.858024035282992],
        "brier": [0.12606583333333335, 0.1723675],
    },
}


@pytest.mark.parametrize("decimals", FORMER)
def test_intervals_are_those_that_sorting_each_resample_gave(decimals):
    evaluation = make_evaluation()
    probabilities = evaluation.probabilities.round(decimals)
    found = intervals(dataclasses.replace(evaluation, probabilities=probabilities))
    for name, expected in FORMER[decimals].items():
        assert found[name] == pytest.approx(expected, abs=1e-12), name


def test_two_classes_without_groups_have_the_intervals_of_a_loop(few_resamples):
    """Twelve metastases are few, so that resamples differ much, and all of them have some."""
    labels = np.repeat([0, 1], [40, 12])
    for decimals in (17, 1):  # the second one makes ties
        evaluation = make_evaluation(labels=labels)
        probabilities = evaluation.probabilities.round(decimals)
        evaluation = dataclasses.replace(evaluation, probabilities=probabilities)
        expected, found = brute_force(evaluation, binary_figures), intervals(evaluation)
        for name in ("average_precision", "f1", "brier"):
            assert found[name] == expected[name], (name, decimals)


def test_a_resample_without_a_metastasis_leaves_average_precision_undefined():
    """Five metastases: exp(-5), seven of 1,000 resamples, draw none of them."""
    labels = np.repeat([0, 1], [95, 5])
    assert 0 < sum(not weights[-5:].any() for weights in resamples(100)) < 25
    found = intervals(make_evaluation(labels=labels))
    assert found["average_precision"] is None
    assert found["brier"] is not None


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


# ---- groups, and more than two classes ----------------------------------------------------------

FEW = 150  # resamples of the comparisons with loops, which call scikit-learn for each


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr("bef_jax.scoring.intervals.RESAMPLES", FEW)


def of_classes(n=200, classes=3, seed=0, groups=None):
    probabilities, labels = predictions(n, classes, seed)
    ids, names = np.arange(n).astype(str), NAMES[:classes]
    metrics = multiclass_metrics(probabilities, labels, names)
    return Evaluation("valid", ids, labels, probabilities, metrics, classes=names, groups=groups)


def patients(n, count=25, seed=0):
    """Returns the patient of each of n patches; some have many patches and some have few."""
    drawn = np.random.default_rng(seed).integers(0, count, n) ** 2 // count
    return np.array([f"patient {number}" for number in drawn])


def rows_of_resamples(evaluation):
    """Yields the rows of each resample: all rows of each group that is drawn."""
    n, rng = len(evaluation.labels), np.random.default_rng(0)
    groups = evaluation.groups
    units = [[row] for row in range(n)]
    if groups is not None:
        units = [np.flatnonzero(groups == name) for name in sorted(set(groups))]
    for _ in range(FEW):
        drawn = rng.integers(0, len(units), len(units))
        yield np.concatenate([units[unit] for unit in drawn])


def brute_force(evaluation, figures):
    """Returns the percentile intervals of figures(labels, probabilities), computed in a loop."""
    found = [
        figures(evaluation.labels[rows], evaluation.probabilities[rows])
        for rows in rows_of_resamples(evaluation)
    ]
    return {
        name: pytest.approx(list(np.percentile([x[name] for x in found], [2.5, 97.5])), abs=1e-12)
        for name in found[0]
    }


def binary_figures(labels, probabilities):
    called = probabilities >= 0.5
    return {
        "accuracy": accuracy_score(labels, called),
        "sensitivity": recall_score(labels, called),
        "specificity": recall_score(labels, called, pos_label=0),
        "average_precision": average_precision_score(labels, probabilities),
        "f1": f1_score(labels, called),
        "brier": brier_score_loss(labels, probabilities),
        "auc": roc_auc_score(labels, probabilities),
    }


def class_figures(labels, probabilities):
    called = probabilities.argmax(axis=1)
    squares = (probabilities - np.eye(probabilities.shape[1])[labels]) ** 2
    return {
        "loss": log_loss(labels, probabilities),
        "accuracy": accuracy_score(labels, called),
        "balanced_accuracy": balanced_accuracy_score(labels, called),
        "auc": roc_auc_score(labels, probabilities, multi_class="ovr"),
        "macro_f1": f1_score(labels, called, average="macro"),
        "brier": squares.sum(axis=1).mean(),
    }


def figures_of_first(labels, probabilities):
    called = probabilities.argmax(axis=1)
    return {
        "auc": roc_auc_score(labels == 0, probabilities[:, 0]),
        "sensitivity": recall_score(labels == 0, called == 0),
        "specificity": recall_score(labels == 0, called == 0, pos_label=False),
    }


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_of_classes_are_those_of_a_loop_over_resamples(grouped, few_resamples):
    evaluation = of_classes(groups=patients(200) if grouped else None)
    found = intervals(evaluation)
    expected = brute_force(evaluation, class_figures)
    assert found.pop("per_class")[NAMES[0]] == brute_force(evaluation, figures_of_first)
    ece = found.pop("ece")
    assert found.pop("resampled", None) == ("groups" if grouped else None)
    assert found == expected
    assert auc_interval(evaluation) == found["auc"]
    assert ece[0] < evaluation.metrics["ece"] < ece[1]


def test_intervals_of_two_classes_with_groups_are_those_of_a_loop(few_resamples):
    evaluation = dataclasses.replace(make_evaluation(200), groups=patients(200))
    found = intervals(evaluation)
    assert found.pop("resampled") == "groups"
    assert found == brute_force(evaluation, binary_figures)
    assert auc_interval(evaluation) == found["auc"]


def test_two_classes_without_groups_have_delongs_interval():
    evaluation = make_evaluation()
    assert auc_interval(evaluation) == evaluation.metrics["auc_ci95"]


def test_copies_of_a_patch_in_one_group_say_nothing_new():
    """If patches count as independent, four copies of each make intervals half as long."""
    single = of_classes(groups=np.array([f"{row:03}" for row in range(200)]))
    copied = dataclasses.replace(
        single,
        labels=np.repeat(single.labels, 4),
        probabilities=np.repeat(single.probabilities, 4, axis=0),
        groups=np.repeat(single.groups, 4),
    )
    once, often = intervals(single), intervals(copied)
    for name in ("loss", "accuracy", "auc", "macro_f1"):
        assert often[name] == pytest.approx(once[name])
    independent = intervals(dataclasses.replace(copied, groups=None))
    ratio = np.ptp(independent["accuracy"]) / np.ptp(often["accuracy"])
    assert ratio == pytest.approx(0.5, abs=0.06)


def test_one_group_has_no_intervals_and_says_why():
    groups = np.full(200, "patient 1")
    for evaluation in (
        of_classes(groups=groups),
        dataclasses.replace(make_evaluation(200), groups=groups),
    ):
        found = intervals(evaluation)
        assert (found.pop("resampled"), found.pop("reason")) == ("groups", ONE_GROUP)
        of_class = found.pop("per_class", {"": {}})
        values = [*found.values(), *(x for figures in of_class.values() for x in figures.values())]
        assert len(values) >= 7 and set(values) == {None}
        assert auc_interval(evaluation) is None


def test_a_resample_draws_as_many_groups_as_there_are():
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    for weights in resamples(6, groups):
        assert weights[0] == weights[2] == weights[5] and weights[1] == weights[4]
        assert weights[[0, 1, 3]].sum() == 3


@pytest.mark.parametrize(("undefined", "expected"), [(0, True), (20, True), (30, False)])
def test_a_few_undefined_resamples_make_an_interval_longer(undefined, expected):
    values = np.random.default_rng(0).normal(size=1000)
    whole = interval_of(values)
    values[:undefined] = np.nan
    found = interval_of(values)
    assert (found is not None) == expected
    if undefined and found:
        assert found[0] < whole[0] < whole[1] < found[1]


def test_intervals_over_groups_cover_the_accuracy_of_new_patients(few_resamples):
    """Each patient has an accuracy of its own, so that patches of one patient are alike."""
    rng, covered = np.random.default_rng(0), {"groups": 0, "patches": 0}
    groups = np.repeat([f"{patient:02}" for patient in range(40)], 20)
    for _ in range(200):
        right = rng.random(800) < np.repeat(rng.beta(3, 2, 40), 20)  # 0.6 on average
        for name, given in (("groups", groups), ("patches", None)):
            accuracies = [weights @ right / weights.sum() for weights in resamples(800, given)]
            low, high = interval_of(np.array(accuracies))
            covered[name] += low <= 0.6 <= high
    # An interval over patches is half as long as it should be, because the variance of 20 patches
    # of one patient is 1 + 19 / 6 times as large as that of 20 independent ones.
    assert covered["groups"] >= 0.88 * 200 and covered["patches"] <= 0.75 * 200
