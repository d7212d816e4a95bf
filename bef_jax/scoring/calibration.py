"""What is chosen on the valid split, and held fixed for every other: a temperature, a threshold."""

import numpy as np

from bef_jax.scoring.metrics import Evaluation, binary_metrics

_TINY = np.finfo(np.float64).tiny  # keeps a probability of exactly 0 or 1 from infinite log-odds
_CHOICES = ("accuracy", "sensitivity", "specificity", "f1")


def tuned(valid: Evaluation, evaluation: Evaluation) -> dict[str, dict]:
    """The blocks of a summary that stand beside the figures of the network as it is.

    Args:
        valid: where temperature and threshold are chosen. On itself they flatter.
        evaluation: what they are applied to.

    Returns:
        calibrated: temperature, and loss, brier and ece with it. operating_point: threshold, and
        accuracy, sensitivity, specificity and f1 at it. Both say `chosen_on`. All but that are None
        where `valid` gives nothing to choose by.
    """
    chosen = choose_operating_point(valid)
    temperature, threshold = chosen["temperature"], chosen["threshold"]
    cooled, at_point = {}, {}
    if temperature is not None:
        cooled = binary_metrics(temper(evaluation.probabilities, temperature), evaluation.labels)
    if threshold is not None:
        at_point = binary_metrics(evaluation.probabilities, evaluation.labels, threshold)
    chosen_on = {"chosen_on": chosen["chosen_on"]}
    # Of the cooled figures those that change: a temperature keeps the order, and so the AUC.
    return {
        "calibrated": chosen_on
        | {"temperature": temperature}
        | {name: cooled.get(name) for name in ("loss", "brier", "ece")},
        "operating_point": chosen_on
        | {"threshold": threshold}
        | {name: at_point.get(name) for name in _CHOICES},
    }


def choose_operating_point(valid: Evaluation) -> dict[str, float | str | None]:
    """Returns the temperature and the threshold that fit a split best, and its name.

    They are None where the split has one class, or one score for all, which decide nothing.
    """
    return {
        "chosen_on": valid.split,
        "temperature": fit_temperature(valid.probabilities, valid.labels),
        "threshold": choose_threshold(valid.probabilities, valid.labels),
    }


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """The temperature that minimises the cross-entropy (Guo et al. 2017, section 4.2).

    Args:
        probabilities: float [N], of class 1.
        labels: [N], 0 or 1.

    Returns:
        Above 1 for a network that is too sure; between exp(-5) and exp(5). None without a choice
        (`choose_operating_point`), or where the loss has no minimum. If the network is right of
        every patch, the loss falls for ever as the temperature does; if its log-odds are on the
        wrong side by more than on the right one, as the temperature rises.
    """
    # Here: the first training step need not wait for it.
    from scipy.optimize import minimize_scalar
    from scipy.special import logit

    if not _can_choose(probabilities, labels):
        return None
    # By how much each patch is on the right side of 0.5. The loss is convex in 1 / temperature, and
    # its slope at 0 is -mean(margins) / 2.
    margins = logit(_inside(probabilities)) * np.where(labels == 1, 1, -1)
    if margins.min() >= 0 or margins.sum() <= 0:
        return None

    def loss(log_temperature: float) -> float:
        return binary_metrics(temper(probabilities, np.exp(log_temperature)), labels)["loss"]

    # Over its logarithm, which keeps it above 0.
    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of class 1, [N], with their log-odds divided by `temperature`."""
    from scipy.special import expit, logit

    return expit(logit(_inside(probabilities)) / temperature)


def _inside(probabilities: np.ndarray) -> np.ndarray:
    # The upper end is the largest float64 below 1; towards 0 they reach much further.
    return np.clip(probabilities, _TINY, 1 - 2**-53)


def choose_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """The threshold of the largest sensitivity + specificity (Youden 1950).

    A probability of at least the threshold counts as class 1. It is that of a sample; None without
    a choice (`choose_operating_point`).
    """
    from sklearn.metrics import roc_curve

    if not _can_choose(probabilities, labels):
        return None
    false_positive, true_positive, thresholds = roc_curve(labels, probabilities)
    # Of equally good ones the highest: they come in falling order.
    best = np.argmax(true_positive - false_positive)
    # roc_curve's first threshold, at which nothing is positive, is infinite.
    return float(min(thresholds[best], 1.0))


def _can_choose(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    return len(np.unique(labels)) == 2 and np.ptp(probabilities) > 0
