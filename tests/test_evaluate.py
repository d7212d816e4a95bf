import jax
import numpy as np
import pytest
from scipy.special import expit, softmax

from bef_jax import checkpoint, evaluate, sharding, train
from bef_jax.data import store
from bef_jax.data.augment import eval_view
from bef_jax.errors import UserError
from bef_jax.models import create
from bef_jax.state import create_state


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


def probability_one_by_one(config, variables, images):
    """Softmax over each patch alone: no batches, no padding."""
    model = create(config.model)
    apply = jax.jit(lambda x: model.apply(variables, eval_view(x, config), train=False))
    logits = np.concatenate([apply(image[None]) for image in images]).astype(np.float64)
    return softmax(logits, axis=1)[:, 1]


@pytest.mark.parametrize("batch_size", [5, 7, 64])
def test_every_patch_counts_once_for_any_batch_size(batch_size, small_config, valid, mesh):
    config = small_config(**{"eval.batch_size": batch_size})
    variables = variables_of(config, mesh)
    evaluation = evaluate.make_evaluator(config, mesh)(variables, valid)
    expected = probability_one_by_one(config, variables, valid.images)
    np.testing.assert_allclose(evaluation.probabilities, expected, rtol=1e-5)
    assert evaluation.metrics["n"] == len(valid) == 21
    np.testing.assert_array_equal(evaluation.ids, valid.ids)


def test_eight_views_are_averaged(small_config, valid, mesh):
    config = small_config(**{"eval.tta": 8})
    variables = variables_of(config, mesh)
    evaluation = evaluate.make_evaluator(config, mesh)(variables, valid)
    turned = [np.rot90(images, k, (1, 2)) for images in (valid.images, valid.images[:, ::-1])
              for k in range(4)]  # fmt: skip
    expected = np.mean([probability_one_by_one(config, variables, x) for x in turned], axis=0)
    np.testing.assert_allclose(evaluation.probabilities, expected, rtol=1e-5)


def test_sure_patches_do_not_tie(small_config, valid, mesh, monkeypatch):
    """Log-odds of 40 and 41 are both 1 in float32."""
    odds = np.linspace(40, 41, len(valid), dtype=np.float32)
    rows = iter(np.split(np.pad(odds, (0, 3)), 3))
    monkeypatch.setattr(evaluate, "make_scorer", lambda *_: lambda _: lambda *_: next(rows))
    evaluation = evaluate.make_evaluator(small_config(), mesh)({}, valid)
    np.testing.assert_array_equal(evaluation.probabilities, expit(odds.astype(np.float64)))


def test_padded_rows_cover_every_row_and_repeat_the_last():
    rows = evaluate.padded_rows(7, 3)
    np.testing.assert_array_equal(rows, [[0, 1, 2], [3, 4, 5], [6, 6, 6]])


def leaves(block):
    """Every figure of a summary's block, by its path."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(block)}


def approximately(figures):
    return {
        name: x if isinstance(x, str) else pytest.approx(x, rel=1e-5) for name, x in figures.items()
    }


@pytest.mark.parametrize("split", ["valid", "test"])
def test_eval_mode_gives_what_training_reported(split, trained, workdir, small_config):
    config = small_config(steps=4, **{"eval.batch_size": 4})
    summary = evaluate.run(config, workdir, None, split)
    assert summary.pop("mode") == "eval"
    assert summary.pop("checkpoint") == str(checkpoint.best(workdir))
    assert summary["split"] == split
    assert leaves(summary) == approximately(leaves(trained[split]))


def test_eight_views_leave_the_plain_figures_beside_theirs(trained, workdir, small_config):
    plain = evaluate.run(small_config(), workdir, None, "valid")
    averaged = evaluate.run(small_config(**{"eval.tta": 8}), workdir, None, "valid")
    assert averaged["plain"]["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert averaged["loss"] != averaged["plain"]["loss"]
    assert "plain" not in plain


def test_another_network_is_compared_on_the_same_patches(trained, workdir, small_config, tmp_path):
    other = {"model.fusion": False, "model.attention": "none", "seed": 1}
    second = train.train_and_evaluate(small_config(steps=4, **other), tmp_path)
    path = checkpoint.best(tmp_path)
    summary = evaluate.run(small_config(), workdir, None, "test", path)
    found = summary["comparison"]
    assert found["auc"] == pytest.approx(second["test"]["auc"])
    assert found["auc_difference"] == pytest.approx(summary["auc"] - second["test"]["auc"])
    assert found["only_first_right"] - found["only_second_right"] == pytest.approx(
        13 * (summary["accuracy"] - second["test"]["accuracy"])
    )
    assert (
        evaluate.run(small_config(), workdir, None, "test", checkpoint.best(workdir))["comparison"][
            "delong_p"
        ]
        == 1.0
    )


def test_eval_mode_takes_the_test_split_and_any_checkpoint(trained, workdir, small_config):
    path = workdir / "checkpoints" / "3"
    summary = evaluate.run(small_config(), workdir, path, None)
    assert (summary["split"], summary["checkpoint"]) == ("test", str(path))


def test_padding_and_batch_normalisation_are_the_checkpoint_s(trained, workdir, small_config):
    other = {"model.padding": "symmetric", "model.bn_epsilon": 1e-5, "model.bn_momentum": 0.99}
    summary = evaluate.run(small_config(**other), workdir, None, "valid")
    assert summary["loss"] == pytest.approx(trained["valid"]["loss"], rel=1e-5)


def test_how_blocks_were_trained_is_nothing_to_eval(trained, workdir, small_config, monkeypatch):
    """A checkpoint of a TPU, whose batch was one of whole kernels; here it is 8."""
    read, forms = checkpoint.read_run, {"mbconv": "pallas", "remat": "block"}

    def read_run(path):
        run = read(path)
        run["config"]["model"] |= forms
        return run

    monkeypatch.setattr(checkpoint, "read_run", read_run)
    given = {f"model.{name}": value for name, value in forms.items()}
    for config in (small_config(), small_config(**given)):
        summary = evaluate.run(config, workdir, None, "valid")
        assert summary["loss"] == pytest.approx(trained["valid"]["loss"], rel=1e-5)


def test_eval_refuses_another_network(trained, workdir, small_config):
    with pytest.raises(UserError, match=r"model\.fusion=True"):
        evaluate.run(small_config(**{"model.fusion": False}), workdir, None, None)


def test_a_field_that_is_gone_is_told_with_its_checkpoint(
    trained, workdir, small_config, monkeypatch
):
    read = checkpoint.read_run

    def read_run(path):
        run = read(path)
        run["config"]["model"]["gone"] = 1
        return run

    monkeypatch.setattr(checkpoint, "read_run", read_run)
    with pytest.raises(UserError, match=r"^checkpoint \S*/3: config\.model\.gone"):
        evaluate.run(small_config(), workdir, workdir / "checkpoints" / "3", None)


def test_eval_needs_a_checkpoint(small_config, tmp_path):
    with pytest.raises(UserError, match="no checkpoint there; train first"):
        evaluate.run(small_config(), tmp_path, None, None)
