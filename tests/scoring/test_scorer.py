"""Probabilities over views, compared with a loop in Python and with scipy's sigmoid."""

import jax
import numpy as np
import pytest
from scipy.special import expit

from bef_jax.data.augment import eval_inputs
from bef_jax.errors import RunError
from bef_jax.models import create
from bef_jax.runtime import sharding
from bef_jax.scoring.scorer import (
    check_finite,
    make_predictor,
    make_scorer,
    mean_probabilities,
    padded_rows,
)
from bef_jax.training.state import create_state


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


def softmax_of(logits):
    """Returns the softmax of a list of numbers, computed by its definition."""
    powers = [np.exp(x - max(logits)) for x in logits]
    return [power / sum(powers) for power in powers]


def test_probabilities_of_three_classes_are_means_of_softmaxes_in_float64():
    views = np.random.default_rng(0).normal(size=(4, 5, 3), scale=9).astype(np.float32)
    found = mean_probabilities(list(views))
    assert found.dtype == np.float64
    for patch, probabilities in zip(views.swapaxes(0, 1), found, strict=True):
        expected = np.mean([softmax_of(logits) for logits in patch.tolist()], axis=0)
        assert probabilities == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_logit_that_is_not_finite_makes_the_patch_nan(value):
    views = np.zeros((2, 3, 4), np.float32)
    views[1, 1, 2] = value
    found = mean_probabilities(views)
    assert np.isnan(found).tolist() == [[False] * 4, [True] * 4, [False] * 4]
    check_finite(found[[0, 2]], ["a", "c"])
    with pytest.raises(RunError, match="no finite score for patch b"):
        check_finite(found, ["a", "b", "c"])


def test_a_network_of_three_classes_gives_a_row_of_probabilities_for_each_patch(small_config):
    config = small_config(**{"model.num_classes": 3, "eval.batch_size": 4})
    mesh = sharding.make_mesh()
    variables = create_state(config, sharding.replicated(mesh)).eval_variables()
    images = np.random.default_rng(0).integers(0, 256, (6, 96, 96, 3), np.uint8)
    by_jax = make_scorer(config, mesh)(variables)
    found = np.concatenate(list(make_predictor(config, by_jax, mesh)(images)))
    model = create(config.model)
    apply = jax.jit(lambda x: model.apply(variables, eval_inputs(x, config), train=False))
    logits = apply(images)
    expected = [softmax_of(row) for row in np.asarray(logits, np.float64).tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_padded_rows_cover_every_row_and_repeat_the_last():
    np.testing.assert_array_equal(padded_rows(7, 3), [[0, 1, 2], [3, 4, 5], [6, 6, 6]])
    assert padded_rows(0, 3).shape == (0, 3)
