"""Values in the plots, compared with scikit-learn or with a plain loop."""

import numpy as np
from sklearn.calibration import calibration_curve

from bef_jax.report import plots
from bef_jax.report.plots import _series, _smoothed
from bef_jax.report.theme import LIGHT


def test_series_of_a_resumed_run_takes_the_last_line_of_a_step():
    lines = [
        {"step": step, "epoch": step / 2, "loss": loss}
        for step, loss in [(1, 0.9), (2, 0.8), (3, 0.7), (2, 0.81), (3, None)]
    ]
    epochs, values = _series([*lines, {"step": 3, "epoch": 1.5, "valid_loss": 0.1}], "loss")
    np.testing.assert_array_equal(epochs, [0.5, 1.0, 1.5])
    np.testing.assert_array_equal(values, [0.9, 0.81, np.nan])


def test_smoothing_is_the_mean_of_a_window():
    values = np.random.default_rng(0).normal(size=200)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(200)]
    np.testing.assert_allclose(_smoothed(values), expected, atol=1e-12)
    np.testing.assert_allclose(_smoothed(values[:50]), values[:50], atol=1e-12)


def test_reliability_matches_scikit_learn(evaluation):
    seen = evaluation(n=500)
    share, mean = calibration_curve(seen.labels, seen.probabilities, n_bins=10)
    found_mean, found_share, count = plots.bins(seen)
    full = count > 0
    np.testing.assert_allclose(found_mean[full], mean)
    np.testing.assert_allclose(found_share[full], share)
    assert count.sum() == 500


def test_the_roc_curve_passes_through_the_point_of_the_threshold(evaluation):
    seen = evaluation(n=300)
    axes = plots.roc({"valid": seen}, LIGHT).axes[0]
    ((x,), (y,)) = axes.lines[-1].get_data()  # the dot
    assert (x, y) == (1 - seen.metrics["specificity"], seen.metrics["sensitivity"])
    curve = np.array(axes.lines[-2].get_data()).T
    assert np.abs(curve - [x, y]).sum(axis=1).min() < 0.02


def test_lines_of_two_splits_differ_in_their_dashes_too(evaluation):
    seen = {split: evaluation(split) for split in ("valid", "test")}
    axes = plots.precision_recall(seen, LIGHT).axes[0]
    lines = [line for line in axes.lines if line.get_label().startswith(("valid", "test"))]
    assert len({line.get_linestyle() for line in lines}) == 2
