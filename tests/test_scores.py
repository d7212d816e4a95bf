import csv

import numpy as np

from bef_jax.metrics import Evaluation
from bef_jax.scores import read_scores, write_scores


def test_every_digit_and_every_id_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    probabilities = np.append(rng.random(5), [0.0, 1e-300, 1 - 2**-53])
    ids = np.array(["plain", "a,b", 'say "x"', "Größe", "two\nlines", "f", "g", "h"])
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.uint8)
    file = tmp_path / "scores_valid.csv"
    write_scores(file, Evaluation("valid", ids, labels, probabilities, {}))
    for wrote, found in zip((ids, labels, probabilities), read_scores(file), strict=True):
        np.testing.assert_array_equal(wrote, found)
    assert next(csv.reader(file.open(newline=""))) == ["id", "label", "probability"]
