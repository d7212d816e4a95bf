"""A temperature and a threshold, chosen on the valid split and kept for every other split."""

import numpy as np
from scipy.special import expit, logit, softmax

from bef_jax.scoring.metrics import Evaluation, cross_entropy
from bef_jax.scoring.multiclass import metrics_of

_TINY = np.finfo(np.float64).tiny  # keeps the log-odds of a probability of 0 finite
_POINT_FIGURES = ("accuracy", "sensitivity", "specificity", "f1")


def tuned_figures(valid: Evaluation, evaluation: Evaluation) -> dict[str, dict]:
    """Returns two blocks of a summary, with figures at a chosen temperature and threshold.

    Args:
        valid: the evaluation on which they are chosen. If it is `evaluation` itself, the figures
            look better than they are.
        evaluation: the evaluation to which they are applied.

    Returns:
        calibrated: temperature, and loss, brier and ece with it. operating_point: threshold, and
        accuracy, sensitivity, specificity and f1 at it. Both name the split, as `chosen_on`. The
        other values are None where nothing could be chosen on `valid`. More than two classes have
        no threshold, so all of their operating point is None.
    """
    chosen = choose_operating_point(valid)
    temperature, threshold = chosen["temperature"], chosen["threshold"]
    probabilities, truth = evaluation.probabilities, (evaluation.labels, evaluation.classes)
    calibrated, at_point = {}, {}
    if temperature is not None:
        calibrated = metrics_of(temper(probabilities, temperature), *truth)
    if threshold is not None:
        at_point = metrics_of(probabilities, *truth, threshold)
    chosen_on = {"chosen_on": chosen["chosen_on"]}
    # For two classes only these figures change, because a temperature keeps the order of patches,
    # and so the AUC. For more classes, it keeps each patch's decision.
    return {
        "calibrated": chosen_on
        | {"temperature": temperature}
        | {name: calibrated.get(name) for name in ("loss", "brier", "ece")},
        "operating_point": chosen_on
        | {"threshold": threshold}
        | {name: at_point.get(name) for name in _POINT_FIGURES},
    }


def choose_operating_point(valid: Evaluation) -> dict[str, float | str | None]:
    """Returns the temperature and the threshold that fit a split best, and the split's name.

    Both are None where the split has one class only, or the same probabilities for all patches,
    because nothing can be chosen there. The temperature is also None where the cross-entropy has no
    minimum (`fit_temperature`), and the threshold where there are more than two classes.
    """
    samples = valid.probabilities, valid.labels
    return {
        "chosen_on": valid.split,
        "temperature": fit_temperature(*samples),
        "threshold": choose_threshold(*samples) if len(valid.classes) == 2 else None,
    }


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the temperature that minimises the cross-entropy (Guo et al. 2017, section 4.2).

    Args:
        probabilities: float, [N] of class 1, or [N, K] for K > 2 classes.
        labels: [N], numbers of classes.

    Returns:
        A number between exp(-5) and exp(5), above 1 for a network that is too confident. None
        where nothing can be chosen (`choose_operating_point`), or where the loss has no minimum. If
        the network is right about every patch, the loss keeps falling as the temperature falls. If
        its log-odds lie further on the wrong side than on the right side (for K > 2: if the right
        class has a lower logit than all have on average), the loss keeps falling as the
        temperature rises.
    """
    # Imported here so that the first training step does not wait for it.
    from scipy.optimize import minimize_scalar

    if not _can_choose(probabilities, labels):
        return None
    # The loss is convex in 1 / temperature. Its slope at 0 has the sign of -over_mean.sum().
    over_best, over_mean = _margins(probabilities, labels)
    if over_best.min() >= 0 or over_mean.sum() <= 0:
        return None

    def loss(log_temperature: float) -> float:
        return cross_entropy(temper(probabilities, np.exp(log_temperature)), labels)

    # Search over the logarithm, which keeps the temperature above 0.
    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def _margins(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far the logit of the right class lies above those of the others.

    Returns:
        [N], above the best of the other classes; and [N], above the mean of all classes. For two
        classes, both say how far a patch is on the right side of 0.5, in log-odds.
    """
    if probabilities.ndim == 1:
        margins = logit(_clip_open(probabilities)) * np.where(labels == 1, 1, -1)
        return margins, margins
    logits, own = _logits(probabilities), (np.arange(labels.size), labels)
    right, mean = logits[own], logits.mean(axis=1)
    logits[own] = -np.inf
    return right - logits.max(axis=1), right - mean


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Returns probabilities with their log-odds or logits divided by `temperature`.

    Args:
        probabilities: float, [N] of class 1, or [N, K].
    """
    if probabilities.ndim == 1:
        return expit(logit(_clip_open(probabilities)) / temperature)
    return softmax(_logits(probabilities) / temperature, axis=1)


def _logits(probabilities: np.ndarray) -> np.ndarray:
    """Returns finite logits, [N, K], whose softmax is `probabilities`."""
    return np.log(np.maximum(probabilities, _TINY))


def _clip_open(probabilities: np.ndarray) -> np.ndarray:
    """Clips to the open interval (0, 1), where log-odds are finite."""
    # The upper end is the largest float64 below 1. Towards 0, float64 has much smaller steps.
    return np.clip(probabilities, _TINY, 1 - 2**-53)


def choose_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the threshold with the largest sensitivity + specificity (Youden 1950).

    A probability of at least the threshold counts as class 1. The threshold is a sample's
    probability; or 1, if that calls nothing positive and no sample's does better. It is never above
    1, because users give it as eval.threshold. It is None where nothing can be chosen
    (`choose_operating_point`).
    """
    from sklearn.metrics import roc_curve

    if not _can_choose(probabilities, labels):
        return None
    false_positive, true_positive, thresholds = roc_curve(labels, probabilities)
    # roc_curve's first threshold is infinite, so that nothing is positive. Use 1 in its place: then
    # nothing is positive either. But if a patch has a probability of 1, leave that entry out. The
    # last threshold, at which all are positive, has the same difference of 0.
    thresholds[0] = 1
    first = int(probabilities.max() == 1)
    # argmax takes the highest of equally good thresholds, because they come in falling order.
    return float(thresholds[first + np.argmax((true_positive - false_positive)[first:])])


def _can_choose(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    return len(np.unique(labels)) > 1 and bool(np.ptp(probabilities, axis=0).any())
