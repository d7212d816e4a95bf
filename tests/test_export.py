"""Exports against the unfolded network, and in processes that lack this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bef_jax import checkpoint, export, sharding, trained
from bef_jax.checkpoint import Checkpoints
from bef_jax.data.augment import eval_view
from bef_jax.errors import RunError, UserError
from bef_jax.models import create
from bef_jax.state import create_state

README = (Path(__file__).parents[1] / "README.md").read_text()


def save_checkpoint(config, workdir):
    state = create_state(config, sharding.replicated(sharding.make_mesh()))
    run = {"config": json.loads(config.to_json_best_effort())}
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(0, state, run, None)
    checkpoints.close()
    return state.eval_variables()


def make_images(n):
    return np.random.default_rng(1).integers(0, 256, (n, 96, 96, 3), np.uint8)


def probability(config, variables, images):
    logits = create(config.model).apply(variables, eval_view(images, config), train=False)
    return np.asarray(jax.nn.softmax(logits)[:, 1])


@pytest.mark.smoke
@pytest.mark.slow
def test_both_files_score_as_the_network_does_where_the_package_is_not(small_config, tmp_path):
    pytest.importorskip("onnxruntime")
    config = small_config()
    variables = save_checkpoint(config, tmp_path)
    path = checkpoint.best(tmp_path)
    summary = export.run(trained.scoring_config(path), tmp_path, path)
    images = make_images(5)  # not as many as the export was checked with
    np.save(tmp_path / "patches.npy", images)
    expected = probability(config, variables, images)
    section = README.split("## Serving")[1].split("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert [len(example.splitlines()) <= 10 for example in examples] == [True, True]
    for example in examples:
        # -P, and a folder elsewhere: what is imported comes from neither the tree nor the tests.
        code = f"import sys; sys.modules['bef_jax'] = None\n{example}"
        command = [sys.executable, "-P", "-c", code]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        np.testing.assert_allclose(json.loads(result.stdout), expected, atol=1e-5)
    assert json.loads((tmp_path / "export" / "export.json").read_text()) == summary
    assert summary["files"]["model.safetensors"]["note"] == "timm has no efficientnet_test"
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        "export.json", "model.onnx", "model.stablehlo"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "efficientnet_lite0", "resnet50", "densenet121"]
)
def test_onnx_of_every_family(name, small_config):
    onnxruntime = pytest.importorskip("onnxruntime")
    from bef_jax.onnx_graph import to_onnx

    config = small_config(**{"model.name": name})
    state = create_state(config, sharding.replicated(sharding.make_mesh()))
    variables, images = state.eval_variables(), make_images(2)
    score = export.folded_score(config, variables)
    content = to_onnx(score, export.patches(), export.OUTPUTS)
    actual = onnxruntime.InferenceSession(content).run(["probability"], {"image": images})[0]
    np.testing.assert_allclose(actual, probability(config, variables, images), atol=1e-5)


def test_a_disagreeing_export_is_not_put_in_place(tmp_path):
    file = tmp_path / "model.onnx"
    for wrong in (0.6, np.nan):
        with pytest.raises(RunError, match="differs from the network"):
            export._place(file, b"", np.array([wrong]), np.array([0.5]))
    assert not list(tmp_path.iterdir())


def test_several_views_are_refused(small_config, tmp_path):
    save_checkpoint(small_config(**{"eval.tta": 8}), tmp_path)
    path = checkpoint.best(tmp_path)
    with pytest.raises(UserError, match=r"eval\.tta=8"):
        export.run(trained.scoring_config(path), tmp_path, path)
