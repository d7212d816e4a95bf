"""Temperature and threshold, compared with scipy, scikit-learn and an exhaustive search."""

import numpy as np
import pytest
from scipy.special import expit, logit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, recall_score

from bef_jax.scoring.calibration import choose_threshold, fit_temperature, temper, tuned_figures
from bef_jax.scoring.metrics import Evaluation, binary_metrics
from bef_jax.scoring.multiclass import multiclass_metrics


def predictions(n=4000, factor=3.0, seed=0):
    """Returns probabilities, whose log-odds are `factor` times the true ones, and labels."""
    rng = np.random.default_rng(seed)
    log_odds = 2 * rng.normal(size=n)
    return expit(factor * log_odds), (rng.random(n) < expit(log_odds)).astype(int)


def evaluation(split, probabilities, labels):
    metrics = binary_metrics(probabilities, labels)
    return Evaluation(split, np.arange(len(labels)).astype(str), labels, probabilities, metrics)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_temperature_is_the_factor_of_overconfidence(factor):
    assert fit_temperature(*predictions(20_000, factor)) == pytest.approx(factor, rel=0.06)


def test_temperature_agrees_with_a_logistic_regression_without_intercept():
    probabilities, labels = predictions(500)
    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    regression.fit(logit(probabilities)[:, None], labels)
    expected = 1 / regression.coef_[0, 0]
    assert fit_temperature(probabilities, labels) == pytest.approx(expected, rel=1e-4)


def test_tempering_keeps_the_order_and_is_finite_for_0_and_1():
    probabilities = np.array([0.0, 1e-300, 0.2, 0.9, 1.0])
    tempered = temper(probabilities, 2.0)
    assert np.isfinite(tempered).all() and (np.diff(tempered) >= 0).all()
    assert tempered[2] == pytest.approx(1 / (1 + np.sqrt(0.8 / 0.2)))


@pytest.mark.parametrize("decimals", [None, 1])
def test_threshold_has_the_largest_youden_index(decimals):
    probabilities, labels = predictions(300)
    probabilities = probabilities if decimals is None else probabilities.round(decimals)

    def youden(threshold):
        called = probabilities >= threshold
        return recall_score(labels, called) + recall_score(labels, called, pos_label=0)

    chosen = choose_threshold(probabilities, labels)
    assert chosen in probabilities
    assert youden(chosen) == pytest.approx(max(map(youden, np.unique(probabilities))))


@pytest.mark.parametrize(
    ("probabilities", "labels", "expected"),
    [
        ([0.2, 0.9], [1, 0], 1.0),  # nothing positive
        ([0.2, 1.0], [1, 0], 0.2),  # all positive, because a patch is positive at 1
        ([0.2, 1.0], [0, 1], 1.0),
    ],
)
def test_threshold_is_as_good_as_it_was_when_chosen(probabilities, labels, expected):
    probabilities, labels = np.array(probabilities), np.array(labels)
    chosen = choose_threshold(probabilities, labels)
    assert chosen == expected
    called = probabilities >= chosen
    assert recall_score(labels, called) + recall_score(labels, called, pos_label=0) >= 1


NOTHING_TO_CHOOSE = {
    "only positives": ([0.1, 0.9, 0.4], [1, 1, 1]),
    "only negatives": ([0.1, 0.9, 0.4], [0, 0, 0]),
    "one probability for all": ([0.5, 0.5, 0.5], [0, 1, 1]),
    "another probability for all": ([0.7, 0.7, 0.7], [0, 1, 1]),
}


@pytest.mark.parametrize("case", NOTHING_TO_CHOOSE)
def test_where_nothing_can_be_chosen_all_figures_are_none(case):
    probabilities, labels = map(np.array, NOTHING_TO_CHOOSE[case])
    assert choose_threshold(probabilities, labels) is None
    assert fit_temperature(probabilities, labels) is None
    blocks = tuned_figures(
        evaluation("valid", probabilities, labels), evaluation("test", *predictions(50))
    )
    assert {key: x for block in blocks.values() for key, x in block.items() if x is not None} == {
        "chosen_on": "valid"
    }


def test_a_network_that_is_right_about_every_patch_has_no_temperature():
    probabilities, labels = np.array([0.2, 0.4, 0.6, 0.9]), np.array([0, 0, 1, 1])
    assert fit_temperature(probabilities, labels) is None
    assert choose_threshold(probabilities, labels) == 0.6
    assert fit_temperature(1 - probabilities, labels) is None  # wrong about every patch


def test_what_is_chosen_on_valid_is_applied_to_test():
    valid = evaluation("valid", *predictions(1000, seed=1))
    test = evaluation("test", *predictions(1000, seed=2))
    blocks = tuned_figures(valid, test)
    temperature = fit_temperature(valid.probabilities, valid.labels)
    threshold = choose_threshold(valid.probabilities, valid.labels)
    calibrated = expit(logit(test.probabilities) / temperature)
    called = test.probabilities >= threshold
    assert blocks["calibrated"]["temperature"] == temperature
    assert blocks["calibrated"]["loss"] == pytest.approx(log_loss(test.labels, calibrated))
    assert blocks["calibrated"]["loss"] < test.metrics["loss"]
    assert blocks["operating_point"]["threshold"] == threshold
    assert blocks["operating_point"]["sensitivity"] == recall_score(test.labels, called)
    assert {block["chosen_on"] for block in blocks.values()} == {"valid"}


# ---- more than two classes ----------------------------------------------------------------------


def class_predictions(n=3000, factor=2.5, seed=0):
    """Returns probabilities of four classes, whose logits are `factor` times the true ones."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(n, 4))
    labels = [rng.choice(4, p=row) for row in softmax(logits, axis=1)]
    return softmax(factor * logits, axis=1), np.array(labels)


def class_evaluation(split, probabilities, labels):
    names = ("a", "b", "c", "d")
    metrics = multiclass_metrics(probabilities, labels, names)
    ids = np.arange(len(labels)).astype(str)
    return Evaluation(split, ids, labels, probabilities, metrics, classes=names)


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_temperature_of_four_classes_has_the_smallest_loss_and_is_the_factor(factor):
    probabilities, labels = class_predictions(factor=factor)
    found = fit_temperature(probabilities, labels)
    assert found == pytest.approx(factor, rel=0.08)
    grid = found * np.linspace(0.9, 1.1, 201)
    losses = [log_loss(labels, softmax(np.log(probabilities) / t, axis=1)) for t in grid]
    assert abs(np.argmin(losses) - 100) <= 1


def test_two_columns_have_the_temperature_of_their_second():
    probabilities, labels = predictions(500)
    both = np.stack([1 - probabilities, probabilities], axis=1)
    expected = fit_temperature(probabilities, labels)
    assert fit_temperature(both, labels) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(temper(both, 3.0)[:, 1], temper(probabilities, 3.0))


def test_tempering_of_classes_keeps_decisions_and_is_finite_for_0():
    probabilities = np.array([[0.0, 0.0, 1.0], [0.2, 0.5, 0.3]])
    tempered = temper(probabilities, 2.0)
    np.testing.assert_array_equal(tempered.argmax(axis=1), [2, 1])
    assert np.isfinite(tempered).all()
    roots = np.sqrt(probabilities[1])
    np.testing.assert_allclose(tempered[1], roots / roots.sum())


CERTAIN = np.array([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])


@pytest.mark.parametrize(
    ("probabilities", "labels"),
    [
        (CERTAIN, [1, 1, 1]),  # one class only
        (np.tile(CERTAIN[:1], (3, 1)), [0, 1, 2]),  # the same probabilities for all
        (CERTAIN, [0, 1, 2]),  # right about every patch
        (CERTAIN, [2, 2, 0]),  # wrong about every patch
    ],
)
def test_classes_of_which_nothing_can_be_chosen_have_no_temperature(probabilities, labels):
    assert fit_temperature(probabilities, np.array(labels)) is None


def test_a_patch_whose_class_comes_second_gives_a_temperature():
    probabilities, labels = np.array([[0.5, 0.4, 0.1], [0.8, 0.1, 0.1]]), np.array([1, 0])
    found = fit_temperature(probabilities, labels)
    losses = [
        log_loss(labels, temper(probabilities, found * t), labels=range(3)) for t in (0.95, 1, 1.05)
    ]
    assert losses[1] == min(losses)


def test_the_blocks_of_four_classes_have_a_temperature_and_no_threshold():
    valid = class_evaluation("valid", *class_predictions(seed=1))
    test = class_evaluation("test", *class_predictions(seed=2))
    calibrated, point = tuned_figures(valid, test).values()
    temperature = fit_temperature(valid.probabilities, valid.labels)
    tempered = softmax(np.log(test.probabilities) / temperature, axis=1)
    assert calibrated["temperature"] == temperature
    assert calibrated["loss"] == pytest.approx(log_loss(test.labels, tempered))
    assert calibrated["ece"] < test.metrics["ece"] and calibrated["brier"] < test.metrics["brier"]
    figures = ("threshold", "accuracy", "sensitivity", "specificity", "f1")
    assert point == {"chosen_on": "valid"} | dict.fromkeys(figures)
