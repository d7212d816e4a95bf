"""Tests how files of weights are read, and that a file which does not fit or which lies is refused.

`test_weights.py` compares the networks themselves with those that the weights come from.
"""

import contextlib
import logging
import pickle

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bef_jax.errors import UserError
from bef_jax.models import weights
from bef_jax.models.weights import reading
from bef_jax.models.weights.timm_config import TimmConfig
from tests.memory import growth_of
from tests.models.weights.test_weights import LITE0, make_model
from tests.special_files import make_special

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev]'")


@pytest.mark.parametrize(
    ("file", "architecture", "padding", "epsilon"),
    [
        ("efficientnet_b0.safetensors", None, "symmetric", 1e-5),
        ("tf_efficientnet_b0.safetensors", None, "same", 1e-3),
        ("model.safetensors", "efficientnet_b0", "symmetric", 1e-5),
        ("model.safetensors", "tf_efficientnet_b0", "same", 1e-3),
    ],
)
def test_timm_s_name_of_a_network_tells_its_padding(file, architecture, padding, epsilon, tmp_path):
    saved = architecture and TimmConfig(architecture)
    tensors = {"conv_stem.weight": np.zeros(1, np.float32)}
    source = reading._source(tmp_path / file, tensors, saved, make_model("efficientnet_b0"))
    assert (source.name, source.padding, source.bn_epsilon) == ("timm", padding, epsilon)


# ---- files that do not fit ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def state():
    return torch.load(weights.resolve(LITE0), weights_only=True)


def test_boosts_and_other_classes_start_from_the_same_weights(caplog):
    caplog.set_level(logging.INFO)
    boosts = {"num_classes": 2, "attention": "cbam", "fusion": True, "total_stride": 16}
    found = flatten_dict(weights.read(LITE0, make_model("efficientnet_lite0", **boosts)).variables)
    plain = flatten_dict(weights.read(LITE0, make_model("efficientnet_lite0")).variables)
    assert "the classifier is left out, because the file has none, or its" in caplog.text
    assert {name[1] for name in plain} - {name[1] for name in found} == {"classifier"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, plain[name])


def test_all_that_is_wrong_is_listed(state, tmp_path):
    path = tmp_path / "w.pth"
    broken = dict(state)
    broken["extra.weight"] = broken.pop("_bn0.bias")
    broken["_conv_head.weight"] = broken["_conv_head.weight"][:7]
    broken["_blocks.3._depthwise_conv.weight"] = torch.zeros(3)
    torch.save(broken, path)
    with pytest.raises(UserError) as error:
        weights.read(path, make_model("efficientnet_lite0"))
    for text in (
        "_bn0.bias is missing",
        "_conv_head.weight is [7, 320, 1, 1], not [1280, 320, 1, 1]",
        "_blocks.3._depthwise_conv.weight is [3], not [144, 1, 5, 5]",
        "extra.weight is unexpected",
    ):
        assert text in str(error.value)


def test_the_needed_shape_is_told_in_torch_s_layout():
    shapes = {
        "params/block_00/squeeze_excite/reduce/kernel": (96, 4),
        "params/stem_norm/bias": (8,),
    }
    names = {name: f"their.{name[-6:]}" for name in shapes}
    tensors = {"their.kernel": np.zeros((4, 95, 1, 1)), "their.m/bias": np.zeros((2, 8))}
    assert reading._misfits(tensors, names, shapes) == [
        "their.kernel is [4, 95, 1, 1], not [4, 96, 1, 1]", "their.m/bias is [2, 8], not [8]"
    ]  # fmt: skip


def test_another_network_s_weights_are_refused():
    with pytest.raises(UserError, match=r"57934424.pth does not fit .*=efficientnet_b0: .* more"):
        weights.read(LITE0, make_model("efficientnet_b0"))


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_another_kind_of_network_is_refused_with_the_file_s_name(name):
    expected = rf"57934424\.pth does not fit config\.model\.name={name}: .*efficientnet-pytorch's"
    with pytest.raises(UserError, match=expected):
        weights.read(LITE0, make_model(name))


def test_a_file_is_opened_once_and_its_network_traced_once(monkeypatch):
    calls = []
    for name in ("read_tensors", "create"):
        original = getattr(reading, name)
        monkeypatch.setattr(reading, name, lambda x, f=original: (calls.append(f), f(x))[1])
    weights.read(LITE0, make_model("efficientnet_lite0"))
    assert len(calls) == len({*calls}) == 2


@pytest.mark.parametrize("state", [{"a": torch.zeros(1)}, {}, [1, 2], {"a": 1}])
def test_a_file_of_something_else_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth is .*(of no known source|it holds no dict)"):
        weights.read(tmp_path / "w.pth", make_model("efficientnet_b0"))


class Trap:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickled_object_is_refused_and_runs_nothing(suffix, write, tmp_path):
    path, trapped = tmp_path / f"w{suffix}", tmp_path / "trapped"
    write({"_conv_stem.weight": torch.zeros(1), "x": Trap(trapped)}, path)
    with pytest.raises(UserError, match="is not a file that holds only tensors"):
        weights.read(path, make_model("efficientnet_b0"))
    assert not trapped.exists()


@pytest.mark.parametrize("content", [b"", b"x" * 100])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(suffix, content, tmp_path):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"w{suffix} is not a "):
        weights.read(path, make_model("efficientnet_b0"))


# ---- files that claim what they are not ---------------------------------------------------------


@pytest.mark.parametrize("key", ["_fc.weight", "_conv_head.weight", "_bn0.num_batches_tracked"])
@pytest.mark.parametrize("of_today", [True, False])
def test_a_number_that_claims_to_be_a_huge_tensor_takes_no_memory(of_today, key, state, tmp_path):
    path, model = tmp_path / "w.pth", make_model("efficientnet_lite0")
    huge = torch.zeros(1, dtype=torch.float16).expand(40_000, 40_000)
    torch.save(dict(state) | {key: huge}, path, _use_new_zipfile_serialization=of_today)
    fits = key != "_conv_head.weight"  # the classifier and counters are left out

    def read():
        expected = (
            contextlib.nullcontext() if fits
            else pytest.raises(UserError, match=r"_conv_head.weight is \[40000, 40000\], not .*\]$")
        )  # fmt: skip
        with expected:
            weights.read(path, model)

    assert growth_of(read) < 300 << 20  # in float32 the tensor would have 6.4 GB


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_network_s_weights_are_read_in_less_than_a_gibibyte(dtype, tmp_path):
    model = make_model("efficientnet_b7")
    shapes = reading._shapes(model)
    ours = {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
    tensors = weights.to_timm(unflatten_dict(ours, sep="/"), model)
    saved = {key: torch.from_numpy(x).to(getattr(torch, dtype)) for key, x in tensors.items()}
    torch.save(saved, tmp_path / "w.pth")
    del saved
    assert growth_of(lambda: weights.read(tmp_path / "w.pth", model)) < 1 << 30


def test_what_is_beyond_float32_is_told_and_no_number(state, tmp_path):
    for value in (1e300, float("nan")):
        kernel = torch.full(state["_conv_stem.weight"].shape, value, dtype=torch.float64)
        torch.save(dict(state) | {"_conv_stem.weight": kernel}, tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"lite0: _conv_stem\.weight is not finite$"):
            weights.read(tmp_path / "w.pth", make_model("efficientnet_lite0"))


def test_strangers_names_of_tensors_stay_one_short_line(state, tmp_path):
    odd = {f"{row}\n\x1b[31m" + "x" * 10**5: torch.zeros(1) for row in range(30)}
    for held in (odd, dict(state) | odd):
        torch.save(held, tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"\\n\\x1b\[31mxxx") as error:
            weights.read(tmp_path / "w.pth", make_model("efficientnet_lite0"))
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 4000
    assert str(error.value).count("is unexpected") == 20
    assert str(error.value).endswith(" and 10 more")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path):
    path = make_special(kind, tmp_path / "special")
    model = make_model("efficientnet_b0")
    for use in (weights.resolve, lambda name: weights.read(name, model)):
        with pytest.raises(UserError, match=f"is a {kind}; name a regular file"):
            use(str(path))


@pytest.mark.parametrize("name", ["pypi:resnet50", "nowhere.pth"])
def test_a_name_that_stands_for_nothing(name):
    with pytest.raises(UserError, match=f"{name}: no such file"):
        weights.resolve(name)
