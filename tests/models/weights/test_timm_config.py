import json
import os

import pytest

from bef_jax.errors import UserError
from bef_jax.models.weights import timm_config
from tests.hub_server import config_of_timm

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def read(folder, content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "config.json").write_bytes(text)
    return timm_config.read(folder / "model.safetensors")


def test_what_timm_writes(tmp_path):
    arguments = {"num_classes": 1000, "in_chans": 3, "global_pool": "avg"}
    found = read(tmp_path, config_of_timm("resnet50", *IMAGENET, model_args=arguments))
    assert (found.architecture, found.mean, found.std) == ("resnet50", *map(tuple, IMAGENET))
    assert found.normalisation() == {"mean": found.mean, "std": found.std}
    assert found.convention() == found.ignored_arguments() == {}


def test_what_timm_wrote_at_first_is_one_dict(tmp_path):
    content = {"architecture": "tf_efficientnet_b0", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert read(tmp_path, content) == timm_config.TimmConfig(
        "tf_efficientnet_b0", (0.5,) * 3, (0.5,) * 3
    )


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({"pad_type": "same", "bn_eps": 1e-3}, {"padding": "same", "bn_epsilon": 1e-3}),
        ({"pad_type": ""}, {"padding": "symmetric"}),
        ({"bn_momentum": 0.25, "bn_eps": None}, {"bn_momentum": 0.75}),
    ],
)
def test_arguments_override_what_the_architecture_means(arguments, fields, tmp_path):
    found = read(tmp_path, {"architecture": "efficientnet_b0", "model_args": arguments})
    assert found.convention() == fields
    assert found.normalisation() == found.ignored_arguments() == {}


def test_arguments_of_another_network_are_named(tmp_path):
    arguments = {"pad_type": "valid", "global_pool": "max", "output_stride": 16, "drop_rate": 0.3}
    found = read(tmp_path, {"architecture": "efficientnet_b0", "model_args": arguments})
    assert found.convention() == {}
    assert set(found.ignored_arguments()) == {"pad_type", "global_pool", "output_stride"}


@pytest.mark.parametrize(
    "content", [{"model_type": "vit"}, [1], [], "efficientnet_b0", 3, None, {}, {"architecture": 3}]
)
def test_other_programs_have_a_config_json_too(content, tmp_path):
    assert read(tmp_path, content) is None


def test_without_it_nothing_is_known(tmp_path):
    assert timm_config.read(tmp_path / "model.safetensors") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"architecture": "efficientn', "damaged .*; if you remove it, the padding may be wrong"),
        (b"\xff\xfe", "damaged .*fetch it again"),
        (b"[" * 100_000, "damaged .*fetch it again"),
        ({"architecture": "b0", "pretrained_cfg": [1]}, "each must be a dict"),
        ({"architecture": "b0", "model_args": "x"}, "each must be a dict"),
        ({"architecture": "b0", "mean": [0.5]}, r"mean=\[0.5\]: give three numbers"),
        ({"architecture": "b0", "mean": "dark"}, "mean='dark': give three numbers"),
        ({"architecture": "b0", "std": [1, 0, 1]}, "std=.*: give three numbers above 0"),
        ({"architecture": "b0", "std": [1, float("nan"), 1]}, "give three numbers"),
        ({"architecture": "b0", "std": [1, 10**400, 1]}, "give three numbers"),
        ({"architecture": "b0", "mean": [True, 0, 1]}, "give three numbers"),
        ({"architecture": "b0", "mean": ["x" * 10**4] * 10**3}, "mean=.*: give three numbers"),
        ({"architecture": "b0" * 10**6}, "is too long: give the name of a network"),
        ({"architecture": "b0", "model_args": {"bn_eps": "1e-3"}}, "bn_eps='1e-3': give a number"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(content, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="is a FIFO"):
        timm_config.read(tmp_path / "model.safetensors")
