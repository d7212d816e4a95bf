"""`bef_jax.load`, compared with --mode=predict, with the training run and with the network."""

import csv
import hashlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import bef_jax
from bef_jax import predict, train
from bef_jax.data import store
from bef_jax.data.augment import eval_inputs
from bef_jax.errors import UserError
from bef_jax.export import export
from bef_jax.models import create
from bef_jax.runtime import sharding
from bef_jax.scoring import gradcam, trained
from bef_jax.scoring.probabilities_csv import read_probabilities
from bef_jax.training import checkpoint
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.state import create_state
from tests.conftest import environment_of
from tests.memory import growth_of
from tests.special_files import make_special


@pytest.fixture
def images(small_config):
    data = small_config().data
    store.prepare(data)
    return np.asarray(store.open_split(store.store_path(data), "test").images)


def save(config, workdir):
    """Saves a checkpoint of random weights, and returns its variables."""
    state = create_state(config, sharding.replicated(sharding.make_mesh()))
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(0, state, {"config": json.loads(config.to_json_best_effort())}, None)
    checkpoints.close()
    return state.eval_variables()


def logits_of(config, variables, images):
    return create(config.model).apply(variables, eval_inputs(images, config), train=False)


def test_predict_agrees_with_mode_predict_to_the_last_digit(run_summary, workdir, scoring, images):
    np.savez(workdir / "patches.npz", images=images)
    config, path = scoring()
    predict.predict_files(config, workdir, path, workdir / "patches.npz")
    with open(workdir / "predictions.csv", newline="") as file:
        expected = [float(row["probability"]) for row in csv.DictReader(file)]
    model = bef_jax.load(str(workdir))
    found = model.predict(images)
    assert found.dtype == np.float64
    assert found.tolist() == expected
    assert model.predict(workdir / "patches.npz").tolist() == expected
    assert model.predict(iter([images[:3], images[3:4], images[4:]])).tolist() == expected
    assert model.checkpoint == checkpoint.best(workdir).resolve()


@pytest.mark.parametrize("chosen", [None, "/of/the/caller"])
def test_a_loaded_run_keeps_compiled_programs_unless_the_caller_has_a_folder(
    chosen, small_config, tmp_path, monkeypatch
):
    save(small_config(), tmp_path / "run")
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", chosen)
    try:
        bef_jax.load(tmp_path / "run")
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found == chosen or (chosen is None and found.startswith(f"{tmp_path}/bef_jax/"))


@pytest.mark.slow
def test_a_loaded_run_scores_valid_as_its_training_did(small_config, tmp_path):
    fields = {"model.total_stride": 16, "rcc.eval_size": 64, "eval.tta": 8}
    train.train_and_evaluate(small_config(steps=2, **fields), tmp_path)
    _, _, expected = read_probabilities(tmp_path / "scores_valid.csv", "")
    model = bef_jax.load(tmp_path)
    split = store.open_split(store.store_path(model.config.data), "valid")
    np.testing.assert_allclose(model.predict(split.images), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"model.name": "efficientnet_b0", "model.total_stride": 16},
        {"model.name": "efficientnet_lite0", "model.attention": "none", "model.fusion": False},
        {"model.name": "resnet50"},
    ],
    ids=["boosted b0", "lite0", "resnet50"],
)
@pytest.mark.slow
def test_every_family_scores_as_its_network_without_folding(fields, small_config, images, tmp_path):
    config = small_config(**fields)
    variables = save(config, tmp_path)
    apply = jax.jit(lambda x: logits_of(config, variables, x))
    expected = softmax(np.asarray(apply(images[:4]), np.float64), axis=1)[:, 1]
    np.testing.assert_allclose(bef_jax.load(tmp_path).predict(images[:4]), expected, rtol=1e-4)


def test_features_are_what_the_classifier_reads(small_config, images, tmp_path):
    config = small_config()
    variables = save(config, tmp_path)
    features = bef_jax.load(tmp_path).features(images)
    layer = variables["params"]["classifier"]
    expected = logits_of(config, variables, images)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features @ layer["kernel"] + layer["bias"], expected, atol=1e-4)


def test_gradcam_maps_lie_between_0_and_1(run_summary, workdir, images):
    model = bef_jax.load(workdir)
    maps = model.gradcam(images)
    assert (maps.shape, maps.dtype) == ((len(images), 96, 96), np.float32)
    assert maps.min() == 0
    largest = maps.max((1, 2))
    assert set(np.round(largest, 6)) <= {0.0, 1.0}
    # The network sees only the central 48 x 48 pixels.
    assert not maps[:, :24].any()
    np.testing.assert_allclose(model.gradcam(images[2:3]), maps[2:3], atol=1e-4)


def test_gradcam_maps_are_those_of_class_1(small_config, images, tmp_path):
    config = small_config()
    explain = gradcam.make_explainer(config, save(config, tmp_path))
    model = bef_jax.load(tmp_path)
    for_1 = explain(images, np.ones(len(images), bool))
    expected = for_1 / for_1.max((1, 2), keepdims=True)
    np.testing.assert_allclose(model.gradcam(images), expected, atol=1e-4)


def test_any_number_of_patches_is_scored_even_none(run_summary, workdir, images):
    model = bef_jax.load(workdir)
    whole = model.predict(images)
    assert model.predict(images[:0]).shape == (0,)
    assert model.features(images[:0]).shape == (0, model.features(images[:1]).shape[1])
    assert model.gradcam(images[:0]).shape == (0, 96, 96)
    alone = np.concatenate([model.predict(image[None]) for image in images[:4]])
    np.testing.assert_allclose(alone, whole[:4], rtol=1e-5)


def test_a_loaded_model_has_its_classes_scale_and_threshold(small_config, tmp_path):
    save(small_config(**{"data.source": "rpcam", "eval.threshold": 0.3}), tmp_path / "rpcam")
    save(small_config(), tmp_path / "drawn")
    real, drawn = bef_jax.load(tmp_path / "rpcam"), bef_jax.load(tmp_path / "drawn")
    assert real.classes == ("normal", "metastasis")
    assert (real.mpp, drawn.mpp) == (0.972, None)
    assert (real.threshold, drawn.threshold) == (0.3, 0.5)
    assert real.operating_point is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 96, 96, 3), np.float32), "float32"),
        (np.zeros((96, 96, 3), np.uint8), r"\[96, 96, 3\]"),
        (np.zeros((2, 64, 64, 3), np.uint8), r"give uint8 \[N, 96, 96, 3\]"),
        ("nowhere.png", "no such file"),
    ],
)
def test_images_of_another_shape_or_dtype_are_refused(wrong, message, run_summary, workdir):
    with pytest.raises(UserError, match=message):
        bef_jax.load(workdir).predict(wrong)


def test_a_missing_or_unreadable_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"load\('nowhere'\): neither a folder nor"):
        bef_jax.load("nowhere")
    with pytest.raises(UserError, match="no checkpoint there"):
        bef_jax.load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"none")
    (tmp_path / "model.stablehlo").write_bytes(b"none")
    for name in ("model.onnx", "model.stablehlo"):
        with pytest.raises(UserError, match=name):
            bef_jax.load(tmp_path / name).predict(np.zeros((1, 96, 96, 3), np.uint8))


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
@pytest.mark.parametrize("name", ["model.onnx", "model.stablehlo"])
def test_a_special_file_is_refused_when_it_is_loaded(name, kind, tmp_path):
    (tmp_path / name).symlink_to(make_special(kind, tmp_path / "special"))
    with pytest.raises(UserError, match=f"is a {kind}; name a regular file"):
        bef_jax.load(tmp_path / name)


def write_tiny_onnx(file, **facts):
    """Writes an ONNX file that doubles its input, as another program could have written."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", 4]) for x in ("x", "y")]
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    helper.set_model_props(model, facts)
    file.write_bytes(model.SerializeToString())


def test_an_onnx_file_of_another_program_is_refused_before_it_scores(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    file = tmp_path / "other.onnx"
    for facts in ({}, {"classes": "[1]", "mpp": "null"}, {"classes": "[", "mpp": "x"}):
        write_tiny_onnx(file, **facts)
        model = bef_jax.load(file)
        assert (model.classes, model.mpp) == (None, None)
        with pytest.raises(UserError, match="was not written by --mode=export"):
            model.predict(np.zeros((1, 96, 96, 3), np.uint8))


def test_other_files_that_an_onnx_file_names_are_not_opened(tmp_path, capfd):
    """ONNX allows weights in other files. The file that is named here is a FIFO."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    file = tmp_path / "model.onnx"
    write_tiny_onnx(file)
    model = onnx.load(file)
    weight = model.graph.initializer.add(name="x", dims=[1, 4], data_type=1, data_location=1)
    for key, value in (("location", "fifo"), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    file.write_bytes(model.SerializeToString())
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="can't be read"):
        bef_jax.load(file).predict(np.zeros((1, 96, 96, 3), np.uint8))
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", ["model.onnx", "model.stablehlo"])
def test_a_file_larger_than_any_export_is_not_read(name, tmp_path):
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    model = bef_jax.load(tmp_path / name)

    def predict():
        with pytest.raises(UserError, match="larger than any"):
            model.predict(np.zeros((1, 96, 96, 3), np.uint8))

    assert growth_of(predict) < 1 << 30


DESCRIPTION = {"classes": ["a", "b"], "mpp": 0.5, "files": {"model.onnx": {"sha256": "0" * 64}}}


WRONG_FIELDS = [
    ("classes", None), ("classes", [1, 2]), ("classes", "ab"), ("mpp", "0.5"), ("mpp", True),
    ("center", "32"), ("center", True), ("files", []), ("files", {"model.onnx": 3}),
    ("files", {"model.onnx": {"sha256": 3}}),
]  # fmt: skip
DAMAGED_DESCRIPTIONS = {
    "empty": "",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "no fields": "{}",
    "nested deeply": "[" * 100_000,
    "cut": json.dumps(DESCRIPTION)[:50],
    "zeros": "\0" * 100,
} | {f"{name}={wrong!r}": json.dumps(DESCRIPTION | {name: wrong}) for name, wrong in WRONG_FIELDS}


@pytest.mark.parametrize("damage", DAMAGED_DESCRIPTIONS)
def test_the_error_about_a_damaged_description_is_one_line(damage, tmp_path):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "export.json").write_text(DAMAGED_DESCRIPTIONS[damage])
    model = bef_jax.load(tmp_path / "model.onnx")
    for use in (lambda: model.classes, lambda: model.predict(np.zeros((1, 96, 96, 3), np.uint8))):
        with pytest.raises(UserError, match=r"export.json: damaged .*; export again") as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.onnx", "model.stablehlo"])
def test_a_file_whose_checksum_differs_from_its_description_is_not_read(name, tmp_path):
    """JAX must not read a damaged file, because it can end the process, or never return."""
    content = b"what was exported"
    checksum = {"sha256": hashlib.sha256(content).hexdigest()}
    description = DESCRIPTION | {"files": {name: checksum}}
    (tmp_path / "export.json").write_text(json.dumps(description))
    for damaged in (content[:-1], b"W" + content[1:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=r"not what export\.json beside it describes"):
            bef_jax.load(tmp_path / name).predict(np.zeros((1, 96, 96, 3), np.uint8))


@pytest.mark.parametrize(
    ("side", "description", "expected"),
    [
        (96, {}, (96, 32, 32)),  # as earlier versions wrote it
        (96, {"center": 0}, (96, 96, 96)),
        (64, {"center": 32}, (64, 32, 32)),
        (224, {}, (224, 224, 224)),
    ],
)
def test_an_exported_file_cuts_pictures_around_its_own_center(
    side, description, expected, tmp_path
):
    (tmp_path / "export.json").write_text(json.dumps(DESCRIPTION | description))
    (tmp_path / "model.onnx").touch()
    assert bef_jax.load(tmp_path / "model.onnx")._tiling(side) == expected


@pytest.mark.parametrize("center", [-1, 65])
def test_a_center_that_does_not_fit_the_patches_is_refused(center, tmp_path):
    (tmp_path / "export.json").write_text(json.dumps(DESCRIPTION | {"center": center}))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match=rf"center={center}, but patches have a side of 64"):
        bef_jax.load(tmp_path / "model.onnx")._tiling(64)


@pytest.mark.slow
def test_an_exported_file_predicts_as_its_checkpoint(
    run_summary, workdir, scoring, images, tmp_path
):
    pytest.importorskip("onnxruntime")
    config, path = scoring()
    export.export_checkpoint(config, workdir, path)
    expected = bef_jax.load(workdir).predict(images)
    for name in ("model.stablehlo", "model.onnx"):
        model = bef_jax.load(workdir / "export" / name)
        np.testing.assert_allclose(model.predict(images), expected, atol=1e-5)
        assert (model.classes, model.mpp) == (("normal", "metastasis"), None)
        for method in (model.features, model.gradcam):
            with pytest.raises(UserError, match="load its checkpoint"):
                method(images)
        # A server may have only this file, without export.json.
        (tmp_path / name).write_bytes((workdir / "export" / name).read_bytes())
        alone = bef_jax.load(tmp_path / name)
        np.testing.assert_allclose(alone.predict(images[:2]), expected[:2], atol=1e-5)
        assert alone.classes == (model.classes if name == "model.onnx" else None)


THREE = {"model.num_classes": 3, "data.classes": ("fat", "a/b", "\U0001f52c")}


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    """Returns the folder of a checkpoint of three classes, which its first test fills."""
    return tmp_path_factory.mktemp("three")


@pytest.fixture
def three(of_three, small_config):
    """Returns (folder, config, variables) of a checkpoint of three classes."""
    config = small_config(**THREE)
    if (of_three / "checkpoints").exists():
        state = create_state(config, sharding.replicated(sharding.make_mesh()))
        return of_three, config, state.eval_variables()
    return of_three, config, save(config, of_three)


def test_three_classes_have_a_column_each(three, images):
    folder, config, variables = three
    model = bef_jax.load(folder)
    assert (model.classes, model.threshold) == (("fat", "a/b", "\U0001f52c"), None)
    logits = np.asarray(logits_of(config, variables, images), np.float64)
    found = model.predict(images)
    assert (found.shape, found.dtype) == ((len(images), 3), np.float64)
    np.testing.assert_allclose(found, softmax(logits, axis=1), rtol=1e-4)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert model.predict(images[:0]).shape == (0, 3)
    features = model.features(images)
    layer = variables["params"]["classifier"]
    np.testing.assert_allclose(features @ layer["kernel"] + layer["bias"], logits, atol=1e-4)


def test_gradcam_maps_of_three_classes_are_of_the_predicted_one(three, images):
    folder, config, variables = three
    model = bef_jax.load(folder)
    called = np.asarray(logits_of(config, variables, images)).argmax(axis=1)
    maps = gradcam.make_explainer(config, variables)(images, called)
    largest = maps.max((1, 2), keepdims=True)
    expected = maps / np.where(largest > 0, largest, 1)
    np.testing.assert_allclose(model.gradcam(images), expected, atol=1e-4)
    assert model.gradcam(images[:0]).shape == (0, 96, 96)


@pytest.mark.slow
def test_exported_files_of_three_classes_predict_as_their_checkpoint(three, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, _, _ = three
    path = trained.find(folder)
    summary = export.export_checkpoint(trained.scoring_config(path), folder, path)
    expected = bef_jax.load(folder).predict(images)
    for name in ("model.stablehlo", "model.onnx"):
        model = bef_jax.load(folder / "export" / name)
        found = model.predict(images)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert model.predict(images[:0]).shape == (0, 3)
        assert model.classes == THREE["data.classes"]
        # A server may have only this file, without export.json.
        (tmp_path / name).write_bytes((folder / "export" / name).read_bytes())
        alone = bef_jax.load(tmp_path / name)
        np.testing.assert_allclose(alone.predict(images[:2]), expected[:2], atol=1e-5)
        assert alone.classes == (model.classes if name == "model.onnx" else None)
    # What the file says of itself is enough to use it without this package.
    session = onnxruntime.InferenceSession(folder / "export" / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list(THREE["data.classes"])
    outputs = json.loads(facts["outputs"])
    assert outputs == summary["outputs"]
    for entry, (name, said) in zip(session.get_outputs(), outputs.items(), strict=True):
        assert (entry.name, list(entry.shape)) == (name, said["shape"])
    probability, logits = session.run(None, {"image": images})
    assert list(outputs) == ["probability", "logits"]
    np.testing.assert_allclose(probability, softmax(logits, axis=1), atol=1e-6)
    np.testing.assert_allclose(probability, expected, atol=1e-5)


@pytest.mark.slow
def test_a_picture_is_cut_into_windows(run_summary, workdir, images, tmp_path):
    Image.fromarray(np.concatenate(images[:2], axis=1)).save(tmp_path / "two.png")
    model = bef_jax.load(workdir)
    found = model.predict(tmp_path / "two.png")
    assert found.shape == (3 * 6,)
    np.testing.assert_allclose(found[[7, 10]], model.predict(images[:2]), rtol=1e-5)


# Prints probabilities, the number of features' rows, and how many rows of a batch each device has.
SCORE = """
import json, sys
import numpy
import bef_jax
from bef_jax.scoring import scorer

map_patches, rows = scorer.map_patches, []

def map_and_note_rows(function, *rest):
    def noted(images):
        rows.append([len(shard.data) for shard in images.addressable_shards])
        return function(images)
    return map_patches(noted, *rest)

scorer.map_patches = map_and_note_rows
model, images = bef_jax.load(sys.argv[1]), numpy.load(sys.argv[2])
print(json.dumps([model.predict(images).tolist(), len(model.features(images)), rows]))
"""


@pytest.mark.slow
def test_scores_on_eight_devices_equal_those_on_one(run_summary, workdir, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", SCORE, str(workdir), str(tmp_path / "images.npy")]
    result = subprocess.run(command, env=environment_of(8), capture_output=True, text=True)
    probabilities, count, rows = json.loads(result.stdout)
    expected = bef_jax.load(workdir).predict(images)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    assert count == len(images) == 13
    assert rows == [[1] * 8] * 4  # two batches of eight patches, for each of the two results


def test_importing_the_package_does_not_import_jax():
    code = "import sys, bef_jax; bef_jax.load; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
