"""Files for timm, read by this package and by safetensors; test_weights.py loads them in timm."""

import functools
import hashlib
import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bef_jax.configs.default import get_config
from bef_jax.errors import RunError
from bef_jax.export import timm
from bef_jax.models import weights
from bef_jax.models.weights import reading

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
TORCH = "model.padding=symmetric,model.bn_epsilon=1e-5"


@functools.cache
def variables_of(name, classes=2):
    """Returns random variables; they do not show the padding or the settings of batch norm."""
    rng = np.random.default_rng(0)
    shapes = reading._shapes(get_config(f"model.name={name},model.num_classes={classes}").model)
    flat = {name: rng.normal(size=leaf.shape).astype("float32") for name, leaf in shapes.items()}
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize(
    ("arg", "architecture", "arguments"),
    [
        ("model.name=efficientnet_b0", "tf_efficientnet_b0", {}),
        (f"model.name=efficientnet_b0,{TORCH}", "efficientnet_b0", {}),
        ("model.name=efficientnet_lite0,model.bn_epsilon=1e-4,model.bn_momentum=0.99",
         "tf_efficientnet_lite0", {"bn_eps": 1e-4, "bn_momentum": 0.01}),
        (f"model.name=resnet50,model.bn_momentum=0.5,{TORCH}", "resnet50", {}),
    ],
)  # fmt: skip
def test_written_files_hold_the_network_and_its_settings(arg, architecture, arguments, tmp_path):
    config = get_config(arg)
    variables = variables_of(config.model.name)
    entry = timm.write(config, variables, tmp_path)
    file = tmp_path / "model.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "config.json"}
    assert (entry["architecture"], entry["note"]) == (architecture, None)
    content = file.read_bytes()
    assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    # Both files have the same permissions, because a server is often another user.
    assert file.stat().st_mode == (tmp_path / "config.json").stat().st_mode
    found = weights.read(file, config.model)
    for field in ("padding", "bn_epsilon"):
        assert found.convention[field] == config.model[field]
    if "efficientnet" in architecture:
        assert found.convention["bn_momentum"] == config.model.bn_momentum
    assert found.normalisation == {"mean": config.augment.mean, "std": config.augment.std}
    described = json.loads((tmp_path / "config.json").read_text())
    assert (described["architecture"], described["model_args"]) == (architecture, arguments)
    assert described["num_classes"] == described["pretrained_cfg"]["num_classes"] == 2
    assert "label_names" not in described
    tensors = safetensors.load_file(file)
    check_same_arrays(tensors, variables)
    # timm finds the classifier by this name, to replace it for another number of classes.
    kernel = tensors[f"{described['pretrained_cfg']['classifier']}.weight"]
    assert kernel.shape == (2, described["num_features"])
    np.testing.assert_array_equal(kernel.T, variables["params"]["classifier"]["kernel"])
    assert f"{described['pretrained_cfg']['first_conv']}.weight" in tensors


def check_same_arrays(tensors, variables):
    """Compares all arrays in torch's layouts; test_weights.py compares their names with timm's."""
    # Transposing keeps an array's first number, and the numbers are random. So it identifies them.
    unseen = {x.flat[0]: x for x in flatten_dict(variables).values()}
    for tensor in tensors.values():
        x = unseen.pop(tensor.flat[0])
        expected = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T  # HWIO -> OIHW, [I, O] -> [O, I]
        assert tensor.shape[: x.ndim] == expected.shape
        np.testing.assert_array_equal(tensor.reshape(expected.shape), expected)
    assert not unseen


def test_another_total_stride_is_noted_and_the_crop_is_timm_s_input_size(tmp_path):
    from safetensors import safe_open

    config = get_config("model.name=efficientnet_b0,model.total_stride=16,rcc.eval_size=64")
    entry = timm.write(config, variables_of("efficientnet_b0"), tmp_path)
    assert "total stride 32, not 16" in entry["note"]
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["total_stride"] == 16
    assert described["pretrained_cfg"]["input_size"] == [3, 64, 64]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "total_stride": "16"}


def test_a_network_of_three_classes_has_their_names(tmp_path):
    names = "data.classes=('fat','a/b','\U0001f52c')"
    config = get_config(f"model.name=efficientnet_b0,model.num_classes=3,{names}")
    variables = variables_of("efficientnet_b0", 3)
    timm.write(config, variables, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["label_names"] == ["fat", "a/b", "\U0001f52c"]
    assert described["num_classes"] == described["pretrained_cfg"]["num_classes"] == 3
    check_same_arrays(safetensors.load_file(tmp_path / "model.safetensors"), variables)


@pytest.mark.parametrize(
    ("arg", "note"),
    [
        ("model.name=efficientnet_test", "timm has no efficientnet_test"),
        ("model.attention=cbam,model.fusion=True", "timm has no place for attention and fusion"),
        ("model.fusion=True", "timm has no place for fusion"),
        ("model.name=resnet50", "timm's resnet50 has padding=symmetric and bn_epsilon=1e-05 only"),
    ],
)
def test_a_network_that_timm_cannot_hold_is_not_written(arg, note, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier export")
    entry = timm.write(get_config(arg), {}, tmp_path)
    assert entry.pop("note") == note
    assert set(entry.values()) == {None}
    assert not list(tmp_path.iterdir())


def test_files_that_read_back_differently_are_not_kept(tmp_path, monkeypatch):
    config = get_config("model.name=efficientnet_b0")
    variables = variables_of(config.model.name)
    written = weights.to_timm(variables, config.model)
    broken = written | {"bn1.weight": written["bn1.weight"] + 1}
    monkeypatch.setattr(weights, "to_timm", lambda *_: broken)
    with pytest.raises(RunError, match="reads back differently"):
        timm.write(config, variables, tmp_path)
    assert not list(tmp_path.iterdir())
