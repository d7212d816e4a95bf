"""Measures what the intervals of 32,768 patches cost, in seconds of CPU time.

    python results/intervals.py [ROUNDS]

Run it in the environment of bef_jax. The patches are random. The cases take turns, five times by
default, and each line has the median of one case and its range.
"""

import sys
import time
from statistics import median

import numpy as np

from bef_jax.scoring.intervals import intervals
from bef_jax.scoring.metrics import Evaluation
from bef_jax.scoring.multiclass import metrics_of

PATCHES, PATIENTS = 32_768, 200


def evaluation(classes: int, grouped: bool) -> Evaluation:
    """Returns random predictions that partly agree with random labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, PATCHES)
    logits = rng.normal(size=(PATCHES, classes))
    logits[np.arange(PATCHES), labels] += 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if classes == 2:
        probabilities = probabilities[:, 1].copy()
    names = tuple(f"class {number}" for number in range(classes))
    patients = rng.integers(0, PATIENTS, PATCHES).astype(str)
    return Evaluation(
        split="valid",
        ids=np.arange(PATCHES).astype(str),
        labels=labels,
        probabilities=probabilities,
        metrics=metrics_of(probabilities, labels, names),
        classes=names,
        groups=patients if grouped else None,
    )


def seconds(case: Evaluation) -> float:
    """Returns the CPU time of the intervals of an evaluation."""
    start = time.process_time()
    intervals(case)
    return time.process_time() - start


def main() -> None:
    """Prints the medians."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    cases = {
        "two classes": evaluation(2, grouped=False),
        "two classes, groups": evaluation(2, grouped=True),
        "nine classes": evaluation(9, grouped=False),
        "nine classes, groups": evaluation(9, grouped=True),
    }
    found = [{name: seconds(case) for name, case in cases.items()} for _ in range(rounds)]
    for name in cases:
        times = [each[name] for each in found]
        print(f"{name}: {median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    main()
