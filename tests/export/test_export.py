"""Compares exports with the unfolded network, also in processes that lack this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bef_jax.data.augment import eval_inputs
from bef_jax.errors import RunError, UserError
from bef_jax.export import export
from bef_jax.models import create
from bef_jax.runtime import lock, sharding
from bef_jax.scoring import trained
from bef_jax.training import checkpoint
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.state import create_state

SERVING = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def save_checkpoint(config, workdir):
    state = create_state(config, sharding.replicated(sharding.make_mesh()))
    run = {"config": json.loads(config.to_json_best_effort())}
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(0, state, run, None)
    checkpoints.close()
    return state.eval_variables()


def make_images(n, side=96):
    return np.random.default_rng(1).integers(0, 256, (n, side, side, 3), np.uint8)


def probability(config, variables, images):
    logits = create(config.model).apply(variables, eval_inputs(images, config), train=False)
    return np.asarray(jax.nn.softmax(logits)[:, 1])


SERVER = """
import json, sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("alone/model.onnx")
facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
spec, low_high = facts["input"], facts["input"]["range"]
images = np.load("patches.npy")
assert images.dtype == spec["dtype"] and list(images.shape[1:]) == spec["shape"][1:]
assert [spec["layout"], spec["channels"], low_high] == ["NHWC", "RGB", [0, 255]]
outputs = dict(zip(facts["outputs"], session.run(list(facts["outputs"]), {spec["name"]: images})))
scores = 1 / (1 + np.exp(-outputs["log_odds"] / facts["temperature"]))
decisions = [facts["classes"][int(score >= facts["threshold"])] for score in scores]
print(json.dumps([facts, outputs["probability"].tolist(), scores.tolist(), decisions]))
"""


def check_that_the_onnx_file_alone_is_enough(folder, summary, expected):
    """Scores in a process without this package, which knows only the file's own metadata."""
    onnx = pytest.importorskip("onnx")
    (folder / "alone").mkdir()
    (folder / "alone" / "model.onnx").write_bytes((folder / "export" / "model.onnx").read_bytes())
    code = f"import sys; sys.modules['bef_jax'] = sys.modules['jax'] = None\n{SERVER}"
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    facts, probabilities, scores, decisions = json.loads(result.stdout)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert decisions == [summary["classes"][int(p >= summary["threshold"])] for p in scores]
    model = onnx.load(folder / "alone" / "model.onnx")
    assert facts == {prop.key: json.loads(prop.value) for prop in model.metadata_props}
    assert (model.producer_name, model.producer_version) == ("bef_jax", summary["version"])
    assert facts == {name: summary[name] for name in facts}
    assert {"version", "classes", "mpp", "normalisation", "input", "outputs", "meaning",
            "threshold", "temperature", "operating_point"} <= set(facts)  # fmt: skip
    assert facts["meaning"]["probability"] == (
        "of class 1, metastasis: sigmoid(log_odds / temperature)"
    )


def test_facts_come_from_the_configuration_and_the_operating_point(small_config):
    config = small_config(**{"data.mpp": 0.972, "eval.threshold": 0.3})
    chosen = {"temperature": 1.5, "threshold": 0.4}
    found = export.facts(config, chosen)
    assert (found["mpp"], found["threshold"], found["operating_point"]) == (0.972, 0.3, chosen)
    assert found["normalisation"]["mean"] == list(config.augment.mean)
    assert found["normalisation"]["std"] == list(config.augment.std)
    assert export.facts(small_config(), None)["mpp"] is None
    json.dumps(found)
    larger = export.facts(small_config(**{"data.patch_size": 224, "rcc.center": 0}), None)
    assert (found["input"]["shape"], found["center"]) == (["n", 96, 96, 3], 32)
    assert (larger["input"]["shape"], larger["center"]) == (["n", 224, 224, 3], 0)
    assert (found["stride"], larger["stride"]) == (32, 224)


def test_facts_of_three_classes_name_each_and_have_no_threshold(small_config):
    names = ("fat", "a/b", "\U0001f52c")
    config = small_config(**{"model.num_classes": 3, "data.classes": names})
    found = export.facts(config, None)
    assert found["classes"] == list(names)
    assert found["threshold"] is None
    shapes = {name: output["shape"] for name, output in found["outputs"].items()}
    assert shapes == {"probability": ["n", 3], "logits": ["n", 3]}
    # Everything that is said has a meaning, and the other way round.
    assert {"probability", "logits", "threshold"} <= set(found["meaning"])
    assert "log_odds" not in json.dumps(found)


# ---- errors that come before anything is compiled -----------------------------------------------


@pytest.fixture
def start_export(small_config, tmp_path, monkeypatch):
    """Returns run(workdir, **fields): exports a checkpoint, and fails if it begins to read it."""

    def run(workdir, **fields):
        path = tmp_path / "checkpoint" / "0"
        for name in ("state", "run"):
            (path / name).mkdir(parents=True, exist_ok=True)
        export.export_checkpoint(small_config(**fields), workdir, path)

    monkeypatch.setattr(checkpoint, "restore_variables", lambda *_: pytest.fail("it has begun"))
    return run


OUTPUTS = ["export_summary.json", *(f"export/{name}" for name in (
    "model.onnx", "model.stablehlo", "model.safetensors", "config.json", "export.json"
))]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make"),
    [("export", os.mkfifo), *((name, make) for name in OUTPUTS for make in (os.mkfifo, os.mkdir))],
)
def test_something_else_in_place_of_an_output_is_refused(name, make, start_export, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is in the way of an output .*; move it away"):
        start_export(tmp_path)


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere"])
def test_a_workdir_that_cannot_be_written_is_refused(name, start_export, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"(is not a folder|cannot be written.*); give another"):
        start_export(tmp_path / name)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "safetensors"])
def test_a_missing_package_is_refused_with_its_installation(
    module, start_export, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == module else name)
    fields = {"model.name": "efficientnet_b0", "model.attention": "none", "model.fusion": False}
    with pytest.raises(UserError, match=rf'needs {module}: pip install "bef_jax\[export\]"'):
        start_export(tmp_path, **fields)
    assert not (tmp_path / "export").exists()


def test_a_second_export_to_the_same_folder_is_refused(start_export, tmp_path):
    with lock.held(tmp_path, ".export.lock"), pytest.raises(UserError, match="another run writes"):
        start_export(tmp_path)
    # A training run in the same folder does not hinder an export.
    with lock.held(tmp_path), pytest.raises(pytest.fail.Exception, match="it has begun"):
        start_export(tmp_path)


def test_scores_that_are_not_finite_are_not_exported(small_config, tmp_path):
    config = small_config()
    variables = save_checkpoint(config, tmp_path)
    for value in (np.nan, np.inf):  # infinite log-odds still give a probability, of 1
        bias = variables["params"]["classifier"]["bias"]
        variables["params"]["classifier"]["bias"] = bias.at[1].set(value)
        with pytest.raises(RunError, match="scores are not finite: export an earlier checkpoint"):
            export._write_files(config, variables, {}, tmp_path / "export")
    assert not list((tmp_path / "export").iterdir())


# ---- what is exported ---------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.slow
def test_both_files_score_as_the_network_does_without_this_package(small_config, tmp_path):
    pytest.importorskip("onnxruntime")
    config = small_config()
    variables = save_checkpoint(config, tmp_path)
    path = checkpoint.best(tmp_path)
    summary = export.export_checkpoint(trained.scoring_config(path), tmp_path, path)
    images = make_images(5)  # another number than the export was checked with
    np.save(tmp_path / "patches.npy", images)
    expected = probability(config, variables, images)
    examples = re.findall(r"```python\n(.*?)```", SERVING, re.DOTALL)
    assert [len(example.splitlines()) <= 10 for example in examples] == [True, True]
    for example in examples:
        # -P and another folder keep Python from importing the source tree or the tests.
        code = f"import sys; sys.modules['bef_jax'] = None\n{example}"
        command = [sys.executable, "-P", "-c", code]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        np.testing.assert_allclose(json.loads(result.stdout), expected, atol=1e-5)
    assert json.loads((tmp_path / "export" / "export.json").read_text()) == summary
    check_that_the_onnx_file_alone_is_enough(tmp_path, summary, expected)
    assert summary["files"]["model.safetensors"]["note"] == "timm has no efficientnet_test"
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        "export.json", "model.onnx", "model.stablehlo"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "efficientnet_lite0", "resnet50", "densenet121"]
)
def test_onnx_of_every_family_scores_as_the_network_does(name, small_config):
    onnxruntime = pytest.importorskip("onnxruntime")
    from bef_jax.models.onnx.graph import to_onnx

    config = small_config(**{"model.name": name})
    state = create_state(config, sharding.replicated(sharding.make_mesh()))
    variables, images = state.eval_variables(), make_images(2)
    outputs_fn = export.folded_outputs_fn(config, variables)
    content = to_onnx(outputs_fn, export.patches_spec(96), export.OUTPUTS)
    actual = onnxruntime.InferenceSession(content).run(["probability"], {"image": images})[0]
    np.testing.assert_allclose(actual, probability(config, variables, images), atol=1e-5)


def test_an_export_that_differs_from_the_network_is_not_written(tmp_path):
    file = tmp_path / "model.onnx"
    for wrong in (0.6, np.nan):
        with pytest.raises(RunError, match="differs from the network"):
            export._place(file, b"", np.array([wrong]), np.array([0.5]))
    assert not list(tmp_path.iterdir())


def test_several_views_are_refused(small_config, tmp_path):
    save_checkpoint(small_config(**{"eval.tta": 8}), tmp_path)
    path = checkpoint.best(tmp_path)
    with pytest.raises(UserError, match=r"eval\.tta=8"):
        export.export_checkpoint(trained.scoring_config(path), tmp_path, path)
