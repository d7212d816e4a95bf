"""Fixtures: a small run to report on."""

from collections.abc import Callable

import numpy as np
import pytest

from bef_jax.scoring.metrics import Evaluation, binary_metrics


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
