"""Fixtures: a small run to report on."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import softmax

from bef_jax.data.patch import label_dtype
from bef_jax.scoring.metrics import Evaluation, binary_metrics
from bef_jax.scoring.multiclass import multiclass_metrics


def make_evaluation(
    probabilities: np.ndarray, labels: np.ndarray, ids: np.ndarray, split: str = "valid"
) -> Evaluation:
    return Evaluation(split, ids, labels, probabilities, binary_metrics(probabilities, labels))


@pytest.fixture
def evaluation() -> Callable[..., Evaluation]:
    def make(split="valid", n=40, seed=0):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, n).astype(np.uint8)
        probabilities = np.clip(0.5 + 0.2 * (2.0 * labels - 1) + 0.3 * rng.normal(size=n), 0, 1)
        ids = np.array([f"{split}/{i}" for i in range(n)])
        return make_evaluation(probabilities, labels, ids, split)

    return make


@pytest.fixture
def history() -> list[dict]:
    train = [{"step": i, "epoch": i / 4, "loss": 1 / i} for i in range(1, 9)]
    valid = [
        {"step": i, "epoch": i / 4, "valid_loss": 0.5, "valid_auc": 0.9, "valid_accuracy": None}
        for i in (4, 8)
    ]
    return train + valid


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 96, 96, 3), dtype=np.uint8)


NAMES = ("fat", "a/b <i>", "$x_1$", "_mucus\n", "\U0001f52c")  # awkward, but possible, names


def make_many(
    n: int = 60, classes: tuple[str, ...] = NAMES, split: str = "valid", seed: int = 0
) -> Evaluation:
    """Returns an evaluation of more than two classes, whose network is often right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(classes), n).astype(label_dtype(len(classes)))
    logits = rng.normal(size=(n, len(classes)))
    logits[np.arange(n), labels] += 1.5
    probabilities = softmax(logits, axis=1)
    metrics = multiclass_metrics(probabilities, labels, classes)
    ids = np.array([f"{split}/{i}" for i in range(n)])
    return Evaluation(split, ids, labels, probabilities, metrics, classes=classes)
