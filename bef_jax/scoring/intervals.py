"""95% confidence intervals of six figures of `metrics`; the AUC has its own there."""

from collections.abc import Callable

import numpy as np

from bef_jax.scoring.metrics import Evaluation, average_precision, brier, f1

LEVEL = 0.95
RESAMPLES = 1000  # so that each end of a percentile interval rests on 25 of them


def intervals(evaluation: Evaluation) -> dict[str, list[float] | None]:
    """Returns intervals [low, high] of six figures, by name; None where one is not defined.

    Accuracy, sensitivity and specificity are proportions and have Wilson's interval. Average
    precision, f1 and brier have a bootstrap interval over patches. A patch counts as one sample,
    although patches of one slide are alike. So figures vary more between slides than this says.
    ECE has no interval: resampling adds noise to every bin, so its bootstrap lies above the figure.
    """
    probabilities, positive = evaluation.probabilities, evaluation.labels == 1
    called = probabilities >= evaluation.metrics["threshold"]
    has_both = 0 < positive.sum() < positive.size
    return {
        "accuracy": wilson(called == positive),
        "sensitivity": wilson(called[positive]),
        "specificity": wilson(~called[~positive]),
        "average_precision": bootstrap(average_precision, probabilities, positive)
        if has_both
        else None,
        "f1": bootstrap(f1, called, positive),
        "brier": bootstrap(brier, probabilities, positive),
    }


def wilson(successes: np.ndarray) -> list[float] | None:
    """Returns Wilson's interval [low, high] of a proportion, from bool [N]; None if N is 0."""
    # Imported here so that the first training step does not wait for it.
    from scipy.stats import binomtest

    if not len(successes):
        return None
    found = binomtest(int(np.sum(successes)), len(successes)).proportion_ci(LEVEL, "wilson")
    return [float(found.low), float(found.high)]


def bootstrap(figure: Callable[..., float | None], *samples: np.ndarray) -> list[float] | None:
    """Returns the percentile interval [low, high] of `figure(*samples)`, the same at every call.

    Args:
        figure: a function that takes arrays [N] and returns a number, or None where undefined.
        samples: those arrays. A resample takes the same rows of each.

    Returns:
        The interval, or None where a resample leaves the figure undefined.
    """
    n, rng = len(samples[0]), np.random.default_rng(0)
    draws = (rng.integers(0, n, n) for _ in range(RESAMPLES))
    # NumPy turns None into NaN.
    found = np.array([figure(*(sample[rows] for sample in samples)) for rows in draws], float)
    tail = 50 * (1 - LEVEL)
    ends = np.percentile(found, [tail, 100 - tail])
    return ends.tolist() if np.isfinite(ends).all() else None
