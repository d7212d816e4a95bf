"""Probabilities over views, compared with a loop in Python and with scipy's sigmoid."""

import numpy as np
import pytest
from scipy.special import expit

from bef_jax.scoring.scorer import mean_probabilities, padded_rows


def test_probabilities_are_means_over_views_in_float64():
    views = np.array([[0.5, -30.0, 40.0], [-2.0, -31.0, 41.0]], np.float32)
    found = mean_probabilities(list(views))
    assert found.dtype == np.float64
    for probability, log_odds in zip(found, views.T.tolist(), strict=True):
        assert probability == pytest.approx(
            sum(1 / (1 + np.exp(-x)) for x in log_odds) / 2, rel=1e-12
        )
    np.testing.assert_array_equal(mean_probabilities(views[:1]), expit(views[0].astype(float)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_view_that_is_not_finite_makes_the_probability_nan(value):
    found = mean_probabilities(np.array([[0.0, 1.0], [value, 1.0]], np.float32))
    assert np.isnan(found).tolist() == [True, False]


def test_padded_rows_cover_every_row_and_repeat_the_last():
    np.testing.assert_array_equal(padded_rows(7, 3), [[0, 1, 2], [3, 4, 5], [6, 6, 6]])
    assert padded_rows(0, 3).shape == (0, 3)
