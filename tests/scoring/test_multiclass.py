"""Figures of more than two classes, compared with scikit-learn and with loops over patches."""

import json

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from bef_jax.scoring import multiclass
from bef_jax.scoring.metrics import binary_metrics
from bef_jax.scoring.multiclass import (
    metrics_of,
    multiclass_metrics,
    weighted_figures,
    weighted_macro_auc,
)

NAMES = ("stroma", "tumour", "fat, and more", "mucus", "debris")


def predictions(n=300, classes=4, seed=0, ties=False):
    """Returns probabilities [N, K] that partly predict the labels, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ties:  # tenths, in rows that still sum to 1
        probabilities = rng.multinomial(10, probabilities) / 10
    return probabilities, labels


def figures_of(probabilities, labels):
    return multiclass_metrics(probabilities, labels, NAMES[: probabilities.shape[1]])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [3, 5])
def test_metrics_are_scikit_learns(classes, ties):
    probabilities, labels = predictions(classes=classes, ties=ties)
    found = figures_of(probabilities, labels)
    called = probabilities.argmax(axis=1)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels, called),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, called),
        "auc": sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr"),
        "macro_f1": sklearn_metrics.f1_score(labels, called, average="macro"),
        "loss": sklearn_metrics.log_loss(labels, probabilities),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert found["confusion"] == sklearn_metrics.confusion_matrix(labels, called).tolist()
    assert list(found["per_class"]) == list(NAMES[:classes])
    for number, of_class in enumerate(found["per_class"].values()):
        truth, decided = labels == number, called == number
        assert of_class == pytest.approx(
            {
                "auc": sklearn_metrics.roc_auc_score(truth, probabilities[:, number]),
                "sensitivity": sklearn_metrics.recall_score(truth, decided),
                "specificity": sklearn_metrics.recall_score(truth, decided, pos_label=False),
            },
            rel=1e-12,
        )


def test_brier_and_calibration_error_agree_with_loops():
    probabilities, labels = predictions()
    found = figures_of(probabilities, labels)
    squares = [
        sum((p - (number == label)) ** 2 for number, p in enumerate(row))
        for row, label in zip(probabilities.tolist(), labels, strict=True)
    ]
    assert found["brier"] == pytest.approx(sum(squares) / 300, rel=1e-12)
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0
    for k in range(15):
        inside = (top >= k / 15) & (top < (k + 1) / 15)
        if inside.any():
            expected += inside.sum() / 300 * abs(right[inside].mean() - top[inside].mean())
    assert found["ece"] == pytest.approx(expected)


def test_the_brier_score_of_a_certain_mistake_is_2():
    found = figures_of(np.eye(3)[[1, 2, 0]], np.arange(3))
    assert (found["brier"], found["accuracy"], found["ece"]) == (2, 0, 1)
    assert found["loss"] == pytest.approx(-np.log(np.finfo(np.float64).eps))


def test_means_are_over_the_classes_that_the_split_has():
    probabilities, labels = predictions(classes=4)
    kept = labels != 2
    probabilities, labels = probabilities[kept], labels[kept]
    called = probabilities.argmax(axis=1)
    assert (called == 2).any()  # decisions for the class that is not there
    found = figures_of(probabilities, labels)
    present = [0, 1, 3]
    recalls = sklearn_metrics.recall_score(labels, called, labels=present, average=None)
    aucs = [sklearn_metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in present]
    f1s = sklearn_metrics.f1_score(labels, called, labels=present, average=None)
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["auc"] == pytest.approx(np.mean(aucs))
    assert found["macro_f1"] == pytest.approx(np.mean(f1s))
    absent = found["per_class"][NAMES[2]]
    assert (absent["auc"], absent["sensitivity"]) == (None, None)
    assert absent["specificity"] == pytest.approx(np.mean(called != 2))


def test_a_split_of_one_class_has_no_auc():
    probabilities, _ = predictions(n=20)
    found = figures_of(probabilities, np.full(20, 1))
    assert found["auc"] is None
    assert found["per_class"][NAMES[1]]["specificity"] is None
    assert found["balanced_accuracy"] == found["accuracy"]


def test_a_summary_has_the_keys_of_two_classes_and_json_takes_it():
    found = figures_of(*predictions(n=30))
    binary = binary_metrics([0.2, 0.9, 0.4], [0, 1, 1])
    assert set(binary) < set(found)
    only_binary = ("sensitivity", "specificity", "f1", "average_precision", "threshold")
    assert {found[name] for name in only_binary} == {None}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_two_classes_have_their_own_metrics():
    probabilities, labels = np.array([0.2, 0.9, 0.4]), np.array([0, 1, 1])
    found = metrics_of(probabilities, labels, NAMES[:2], 0.3)
    assert found == binary_metrics(probabilities, labels, 0.3)
    wide, labels = predictions(n=12, classes=3)
    assert metrics_of(wide, labels, NAMES[:3]) == figures_of(wide, labels)


def test_labels_of_more_than_256_classes_are_counted_right():
    probabilities, labels = predictions(n=900, classes=300)
    names = [str(number) for number in range(300)]
    found = multiclass_metrics(probabilities, labels.astype(np.uint16), names)
    called = probabilities.argmax(axis=1)
    assert found["confusion"] == sklearn_metrics.confusion_matrix(labels, called).tolist()
    assert found["accuracy"] == np.mean(called == labels)


def test_very_many_classes_have_no_confusion_matrix(monkeypatch):
    monkeypatch.setattr(multiclass, "_LARGEST_CONFUSION", 4)
    assert figures_of(*predictions(classes=4))["confusion"] is not None
    assert figures_of(*predictions(classes=5))["confusion"] is None


@pytest.mark.parametrize("ties", [False, True])
def test_figures_of_a_weighted_split_are_those_of_its_copies(ties):
    """A patch of weight 3 counts as three patches, and one of weight 0 does not count."""
    probabilities, labels = predictions(ties=ties)
    weights = np.random.default_rng(1).poisson(1, 300)
    found = weighted_figures(probabilities, labels)(weights)
    rows = np.repeat(np.arange(300), weights)
    expected = figures_of(probabilities[rows], labels[rows])
    of_class = found.pop("per_class")
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-12)
    for column, figures in zip(of_class.T, expected["per_class"].values(), strict=True):
        assert list(column) == pytest.approx(list(figures.values()), rel=1e-12)


def test_a_resample_without_one_of_the_classes_has_no_macro_figure():
    """The mean of the other classes would be another figure."""
    probabilities, labels = predictions()
    found = weighted_figures(probabilities, labels)((labels != 1).astype(int))
    assert np.isnan([found["auc"], found["balanced_accuracy"], found["macro_f1"]]).all()
    assert np.isnan(weighted_macro_auc(probabilities, labels)((labels != 1).astype(int)))
    assert np.isfinite([found["accuracy"], found["loss"], found["ece"]]).all()


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([], [], r"need \[N, 3\]"),
        ([[0.5, 0.5]], [0], r"need \[N, 3\]"),
        ([[0.2, 0.3, 0.5]], [0, 1], r"need \[N, 3\]"),
        ([[0.2, 0.3, 0.5]], [3], "whole labels from 0 to 2"),
        ([[0.2, 0.3, 0.5]], [-1], "whole labels from 0 to 2"),
        ([[0.2, 0.3, 0.5]], [0.5], "whole labels from 0 to 2"),
        ([[0.2, np.nan, 0.5]], [0], "that sum to 1"),
        ([[0.2, 0.2, 0.5]], [0], "that sum to 1"),
        ([[-0.2, 0.7, 0.5]], [0], "that sum to 1"),
    ],
)
def test_arrays_that_cannot_be_scored_are_refused(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        multiclass_metrics(probabilities, labels, NAMES[:3])
