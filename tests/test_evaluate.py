"""Compares evaluation with a loop over single patches, and with what training reported."""

import jax
import numpy as np
import pytest
from scipy.special import expit, softmax

from bef_jax import evaluate, train
from bef_jax.data import store
from bef_jax.data.augment import eval_inputs
from bef_jax.models import create
from bef_jax.runtime import sharding
from bef_jax.scoring import evaluator
from bef_jax.training import checkpoint
from bef_jax.training.state import create_state


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


@pytest.fixture
def valid(small_config):
    data = small_config().data
    store.prepare(data)
    return store.open_split(store.store_path(data), "valid")


def variables_of(config, mesh):
    return create_state(config, sharding.replicated(mesh)).eval_variables()


def probabilities_one_by_one(config, variables, images):
    """Returns the softmax of each patch alone, without batches and padding."""
    model = create(config.model)
    apply = jax.jit(lambda x: model.apply(variables, eval_inputs(x, config), train=False))
    logits = np.concatenate([apply(image[None]) for image in images]).astype(np.float64)
    return softmax(logits, axis=1)[:, 1]


@pytest.mark.smoke
@pytest.mark.parametrize("batch_size", [5, 7, 64])
def test_every_patch_counts_once_for_any_batch_size(batch_size, small_config, valid, mesh):
    config = small_config(**{"eval.batch_size": batch_size})
    variables = variables_of(config, mesh)
    evaluation = evaluator.make_evaluator(config, mesh)(variables, valid)
    expected = probabilities_one_by_one(config, variables, valid.images)
    np.testing.assert_allclose(evaluation.probabilities, expected, rtol=1e-5)
    assert evaluation.metrics["n"] == len(valid) == 21
    np.testing.assert_array_equal(evaluation.ids, valid.ids)


def test_eight_views_are_averaged(small_config, valid, mesh):
    config = small_config(**{"eval.tta": 8})
    variables = variables_of(config, mesh)
    evaluation = evaluator.make_evaluator(config, mesh)(variables, valid)
    patches = valid.images[:]
    turned = [np.rot90(images, k, (1, 2)) for images in (patches, patches[:, ::-1])
              for k in range(4)]  # fmt: skip
    expected = np.mean([probabilities_one_by_one(config, variables, x) for x in turned], axis=0)
    np.testing.assert_allclose(evaluation.probabilities, expected, rtol=1e-5)


def test_confident_patches_do_not_tie(small_config, valid, mesh, monkeypatch):
    """In float32, log-odds of 20 and of 21 both have the probability 1."""
    odds = np.linspace(20, 21, len(valid), dtype=np.float32)
    rows = iter(np.split(np.pad(odds, (0, 3)), 3))
    monkeypatch.setattr(evaluator, "make_scorer", lambda *_: lambda _: lambda _: [next(rows)])
    evaluation = evaluator.make_evaluator(small_config(), mesh)({}, valid)
    assert (np.diff(evaluation.probabilities) > 0).all()
    np.testing.assert_array_equal(evaluation.probabilities, expit(odds.astype(np.float64)))


def leaves(block):
    """Returns every figure of a summary's block by its path."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(block)}


def approximately(figures):
    return {
        name: x if isinstance(x, str) else pytest.approx(x, rel=1e-5) for name, x in figures.items()
    }


@pytest.mark.smoke
@pytest.mark.parametrize("split", ["valid", "test"])
def test_eval_mode_gives_what_training_reported(split, run_summary, workdir, scoring):
    config, path = scoring(**{"eval.batch_size": 4})
    summary = evaluate.evaluate_checkpoint(config, path, split)
    assert summary.pop("mode") == "eval"
    assert summary.pop("checkpoint") == str(checkpoint.best(workdir))
    assert summary["split"] == split
    assert leaves(summary) == approximately(leaves(run_summary[split]))


def test_eight_views_report_the_figures_of_one_view_too(run_summary, scoring):
    plain = evaluate.evaluate_checkpoint(*scoring(), "valid")
    averaged = evaluate.evaluate_checkpoint(*scoring(**{"eval.tta": 8}), "valid")
    assert averaged["plain"]["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert averaged["loss"] != averaged["plain"]["loss"]
    assert "plain" not in plain


def test_another_network_is_compared_on_the_same_patches(
    run_summary, scoring, small_config, tmp_path
):
    other = {"model.fusion": False, "model.attention": "none", "seed": 1}
    second = train.train_and_evaluate(small_config(steps=4, **other), tmp_path)
    config, path = scoring()
    summary = evaluate.evaluate_checkpoint(config, path, "test", checkpoint.best(tmp_path))
    found = summary["comparison"]
    assert found["auc"] == pytest.approx(second["test"]["auc"])
    assert found["auc_difference"] == pytest.approx(summary["auc"] - second["test"]["auc"])
    assert found["only_first_right"] - found["only_second_right"] == pytest.approx(
        13 * (summary["accuracy"] - second["test"]["accuracy"])
    )
    assert evaluate.evaluate_checkpoint(config, path, "test", path)["comparison"]["delong_p"] == 1.0


def test_eval_mode_takes_the_test_split_by_default_and_any_checkpoint(
    run_summary, workdir, scoring
):
    path = workdir / "checkpoints" / "3"
    summary = evaluate.evaluate_checkpoint(scoring()[0], path)
    assert (summary["split"], summary["checkpoint"]) == ("test", str(path))
