"""What is chosen on the valid split, and held fixed for every other: a temperature, a threshold."""

import numpy as np

from bef_jax.metrics import Evaluation, binary_metrics

_TINY = np.finfo(np.float64).tiny  # keeps a probability of exactly 0 or 1 from infinite log-odds
_CHOICES = ("accuracy", "sensitivity", "specificity", "f1")


def tuned(valid: Evaluation, evaluation: Evaluation) -> dict[str, dict]:
    """The blocks of a summary that stand beside the figures of the network as it is.

    Args:
        valid: where temperature and threshold are chosen. On itself they flatter.
        evaluation: what they are applied to.

    Returns:
        calibrated: temperature, and loss, brier and ece with it. operating_point: threshold, and
        accuracy, sensitivity, specificity and f1 at it. Both say `chosen_on`.
    """
    chosen = choose_operating_point(valid)
    temperature, threshold = chosen["temperature"], chosen["threshold"]
    cooled = binary_metrics(temper(evaluation.probabilities, temperature), evaluation.labels)
    at_point = binary_metrics(evaluation.probabilities, evaluation.labels, threshold)
    chosen_on = {"chosen_on": chosen["chosen_on"]}
    # Of the cooled figures those that change: a temperature keeps the order, and so the AUC.
    return {
        "calibrated": chosen_on
        | {"temperature": temperature}
        | {name: cooled[name] for name in ("loss", "brier", "ece")},
        "operating_point": chosen_on
        | {"threshold": threshold}
        | {name: at_point[name] for name in _CHOICES},
    }


def choose_operating_point(valid: Evaluation) -> dict[str, float | str]:
    """Returns the temperature and the threshold that fit a split best, and its name."""
    return {
        "chosen_on": valid.split,
        "temperature": fit_temperature(valid.probabilities, valid.labels),
        "threshold": choose_threshold(valid.probabilities, valid.labels),
    }


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the cross-entropy (Guo et al. 2017, section 4.2).

    Args:
        probabilities: float [N], of class 1.
        labels: [N], 0 or 1.

    Returns:
        Above 1 for a network that is too sure; between exp(-5) and exp(5).
    """
    # Here: the first training step need not wait for it.
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return binary_metrics(temper(probabilities, np.exp(log_temperature)), labels)["loss"]

    # Over its logarithm, which keeps it above 0. Bounded, since where no patch is on the wrong side
    # of 0.5 the loss falls for ever as the temperature does.
    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of class 1, [N], with their log-odds divided by `temperature`."""
    from scipy.special import expit, logit

    # The upper end is the largest float64 below 1; towards 0 they reach much further.
    return expit(logit(np.clip(probabilities, _TINY, 1 - 2**-53)) / temperature)


def choose_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The threshold of the largest sensitivity + specificity (Youden 1950); 0.5 for one class.

    A probability of at least the threshold counts as class 1. It is that of a sample.
    """
    from sklearn.metrics import roc_curve

    if len(np.unique(labels)) < 2:
        return 0.5
    false_positive, true_positive, thresholds = roc_curve(labels, probabilities)
    # Of equally good ones the highest: they come in falling order.
    best = np.argmax(true_positive - false_positive)
    # roc_curve's first threshold, at which nothing is positive, is infinite.
    return float(min(thresholds[best], 1.0))
