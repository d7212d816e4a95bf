"""Checks the files in configs/, their arguments, and which values validation refuses."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bef_jax import config as checks
from bef_jax.configs import b2, default, paper, quickstart
from bef_jax.configs import fields as fields_of_config
from bef_jax.configs.fields import FIELDS
from bef_jax.errors import UserError
from bef_jax.models import create

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "fields"})


def expect_error(*parts, config):
    """Checks that validation fails, with one line that holds every part."""
    with pytest.raises(UserError) as caught:
        checks.validate(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def load(name, arg=None):
    return importlib.import_module(f"bef_jax.configs.{name}").get_config(arg)


def changed(**fields):
    """Returns the default configuration with fields changed past ml_collections' type checks."""
    config = default.get_config()
    for name, value in fields.items():
        *path, leaf = name.split(".")
        tree = config
        for key in path:
            tree = tree[key]
        with tree.ignore_type(), tree.unlocked():
            tree[leaf] = value
    return config


# ---- the files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_valid(name):
    config = load(name)
    checks.validate(config)
    assert config.name == name
    assert checks.flatten(config).keys() == checks.flatten(default.get_config()).keys()


@pytest.mark.parametrize(("name", "devices"), [("gpu", 1), ("gpu8", 8), ("tpu8", 8)])
def test_files_for_gpus_and_tpus_fill_their_devices(name, devices):
    config = load(name)
    assert config.dtype == "bfloat16"
    assert config.bn_groups == devices  # no statistics cross devices
    assert config.batch_size == 256 * devices
    peak = config.optim.learning_rate * config.batch_size / 256
    assert peak == pytest.approx(2e-3 * math.sqrt(devices), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_takes_an_argument(name):
    config = load(name, "batch_size=24,model.dropout=0.5")
    assert (config.batch_size, config.model.dropout) == (24, 0.5)


@pytest.mark.parametrize("variant", [f"b{i}" for i in range(8)])
def test_boosted_files_switch_all_changes_on_for_their_network(variant):
    config = load(variant)
    assert config.model.name == f"efficientnet_{variant}"
    assert config.rcc.enabled
    assert (config.model.total_stride, config.model.attention) == (16, "cbam")
    assert config.model.fusion
    assert config.data.source != "synthetic"


def test_paper_is_b3_on_rectified_pcam():
    config = paper.get_config()
    assert config.model == load("b3").model
    assert config.data.rectify
    assert config.data.source == "pcam_hdf5"


def test_only_quickstart_is_synthetic():
    synthetic = [name for name in NAMES if load(name).data.source == "synthetic"]
    assert synthetic == ["quickstart"]
    assert quickstart.get_config().model.name == "efficientnet_test"


# ---- arguments ----------------------------------------------------------------------------------


def test_arguments_are_typed():
    config = b2.get_config(
        "batch_size=64, seed=3,model.total_stride=32,model.fusion=false,optim.learning_rate=1e-4,"
        "epochs=3,steps=70,data.dir=/a/b,rcc.enabled=True"
    )
    checks.validate(config)
    assert config.batch_size == 64
    assert config.seed == 3
    assert config.model.total_stride == 32
    assert config.model.fusion is False
    assert config.rcc.enabled is True
    assert config.optim.learning_rate == 1e-4
    assert config.epochs == 3
    assert config.steps == 70
    assert config.data.dir == "/a/b"


@pytest.mark.parametrize("arg", [None, ""])
def test_no_argument_changes_nothing(arg):
    assert default.get_config(arg).to_dict() == default.get_config().to_dict()


@pytest.mark.parametrize(
    ("arg", "part"),
    [
        ("batch_size", "batch_size"),
        ("batchsize=3", "batchsize"),
        ("model.depth=3", "depth"),
        ("batch_size=many", "batch_size=many"),
        ("batch_size=2.5", "batch_size=2.5"),
        ("seed=1,rcc.fill=3", "rcc.fill=3"),
    ],
)
def test_wrong_arguments_are_named(arg, part):
    with pytest.raises(ValueError, match=part):
        default.get_config(arg)


# ---- single fields ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batchsize", "model.depth", "rcc.size", "optim.lr"])
def test_unknown_fields_are_named(name):
    expect_error(f"config.{name} is unknown", "default.py", config=changed(**{name: 1}))


@pytest.mark.parametrize("name", ["batch_size", "model.name", "eval.tta", "optim.accumulate"])
def test_missing_fields_are_named(name):
    config = default.get_config()
    *path, leaf = name.split(".")
    tree = config[path[0]] if path else config
    with tree.unlocked():
        del tree[leaf]
    expect_error(f"config.{name} is missing", config=config)


@pytest.mark.parametrize("section", ["model", "rcc", "optim"])
def test_a_missing_section_is_named(section):
    config = default.get_config()
    with config.unlocked():
        del config[section]
    expect_error(f"config.{section}.", "is missing", config=config)


@pytest.mark.parametrize("section", ["model", "augment"])
def test_a_section_that_is_a_number_is_named(section):
    expect_error(f"config.{section}", config=changed(**{section: 3}))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("batch_size", "64", "int"),
        ("batch_size", 64.0, "int"),
        ("batch_size", None, "int"),
        ("batch_size", True, "int"),
        ("steps", 1.5, "int"),
        ("steps", "all", "int"),
        ("data.train_size", False, "int"),
        ("epochs", "ten", "float"),
        ("optim.learning_rate", None, "float"),
        ("rcc.enabled", 1, "bool"),
        ("rcc.enabled", "yes", "bool"),
        ("model.name", 3, "str"),
        ("data.store", None, "str"),
        ("augment.mean", 0.5, "tuple"),
        ("model.fusion_stages", 3, "tuple"),
    ],
)
def test_mistyped_fields_are_named(name, value, wanted):
    config = changed(**{name: value})
    expect_error(f"config.{name}={value!r}", "wrong type", wanted, config=config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 3),
        ("augment.stain", 0),
        ("steps", 5),
        ("augment.mean", [0.5] * 3),
        ("model.fusion_stages", [2, 3]),
        ("data.test_size", None),
    ],
)
def test_values_that_fit_the_type_are_valid(name, value):
    checks.validate(changed(**{name: value}))


@pytest.mark.parametrize("name", checks.CHOICES)
def test_unknown_choices_are_refused_with_a_list_of_the_known_ones(name):
    kind = type(checks.CHOICES[name][0])
    value = kind("5") if kind is int else "other"
    listed = [str(choice) for choice in checks.CHOICES[name]]
    expect_error(f"config.{name}={value!r}", *listed, config=changed(**{name: value}))


def out_of_range():
    fields = checks.flatten(default.get_config())
    for name, (least, greatest) in checks.RANGES.items():
        kind = float if isinstance(fields[name], float) else int
        yield name, kind(least - 1)
        yield name, kind(2 * greatest + 1)
        if kind is float:
            yield from [(name, math.nan), (name, math.inf)]


@pytest.mark.parametrize(("name", "value"), list(out_of_range()))
def test_values_out_of_range_are_named(name, value):
    expect_error(f"config.{name}={value!r} is out of range", config=changed(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval.batch_size", 10**12),
        ("batch_size", 65_537),
        ("optim.head_only_steps", 10**30),
        ("steps", 2**63),
        ("steps", 2**31),
        ("epochs", 1e300),
        ("model.attention_kernel", 2**31 - 1),
        ("ablation.seeds", 10**6),
    ],
)
def test_values_that_no_run_could_use_are_out_of_range(name, value):
    expect_error(f"config.{name}=", "is out of range", config=changed(**{name: value}))


def test_every_limit_of_a_whole_number_fits_in_int32():
    fields = checks.flatten(default.get_config())
    limits = [most for name, (_, most) in checks.RANGES.items() if type(fields[name]) is int]
    assert len(limits) > 10
    assert max(limits) == 2**31 - 1


def test_the_table_has_every_field_and_uses_every_effect():
    fields = checks.flatten(default.get_config())
    assert FIELDS.keys() == fields.keys()
    effects = {fields_of_config.NETWORK, fields_of_config.OPTIMIZER, fields_of_config.INPUT}
    effects |= {fields_of_config.SCORE, fields_of_config.TRAINING, fields_of_config.DATA}
    effects |= {fields_of_config.SPEED, fields_of_config.ENVIRONMENT}
    assert {field.affects for field in FIELDS.values()} == effects
    assert np.finfo(np.float32).max == fields_of_config.MOST_FLOAT


def test_every_number_has_a_range_or_choices():
    numbers = [
        name
        for name, value in checks.flatten(default.get_config()).items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    ]
    assert [n for n in numbers if n not in checks.RANGES and n not in checks.CHOICES] == []


# ---- combinations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"rcc.min_size": 80, "rcc.max_size": 64}, "config.rcc.min_size=80"),
        ({"rcc.eval_size": 65}, "config.rcc.eval_size=65 can't lie in the middle"),
        ({"data.patch_size": 97, "rcc.center": 33, "rcc.eval_size": 64}, "give an odd side"),
        ({"data.patch_size": 97}, "rcc.center=32 can't lie in the middle of data.patch_size=97"),
        ({"data.patch_size": 64, "rcc.center": 96}, "config.rcc.center=96 is above"),
        ({"rcc.max_size": 97}, "config.rcc.max_size=97 is above data.patch_size=96"),
        ({"data.patch_size": 64, "rcc.eval_size": 96}, "config.rcc.eval_size=96 is above"),
        ({"rcc.min_size": 31}, "config.rcc.min_size=31 is below rcc.center=32"),
        ({"data.patch_size": 40}, "config.rcc.min_size=26 is below rcc.center=32"),
        ({"rcc.center": 64, "rcc.eval_size": 48}, "config.rcc.eval_size=48 is below"),
        ({"rcc.enabled": False, "data.patch_size": 97}, "or 0 for none"),
        ({"model.attention_kernel": 4}, "config.model.attention_kernel"),
        ({"epochs": 0.0}, "config.epochs"),
        ({"eval.every_epochs": 0.0}, "config.eval.every_epochs"),
        ({"batch_size": 64, "optim.accumulate": 3}, "config.optim.accumulate"),
        ({"batch_size": 64, "bn_groups": 3}, "config.bn_groups"),
        ({"batch_size": 64, "optim.accumulate": 16, "bn_groups": 8}, "config.bn_groups"),
        (
            {"model.mbconv": "pallas", "batch_size": 192},
            "set config.batch_size to a multiple of 128",
        ),
        ({"model.mbconv": "pallas", "batch_size": 256, "bn_groups": 4}, "a multiple of 512"),
        (
            {"model.mbconv": "pallas", "batch_size": 256, "bn_groups": 2, "optim.accumulate": 2},
            "a multiple of 512",
        ),
        ({"model.mbconv": "pallas", "batch_size": 128, "model.name": "resnet50"}, "EfficientNets"),
        ({"augment.mean": (0.5, 0.5)}, "config.augment.mean"),
        ({"augment.std": (0.5, 0.5, "x")}, "config.augment.std"),
        ({"augment.std": (0.5, 0.0, 0.5)}, "config.augment.std"),
        ({"augment.mean": (0.5, 0.5, math.nan)}, "config.augment.mean"),
        ({"augment.mean": (0.5, 0.5, 10**400)}, "config.augment.mean"),
        ({"optim.freeze": "(" * 10_000, "model.name": "efficientnet_test"}, "config.optim.freeze"),
        ({"optim.freeze": "a{9999999999}", "model.name": "efficientnet_test"}, "not a regular exp"),
        ({"data.split_ratio": (0.5, 0.5)}, "numbers, the shares of train, valid and test"),
        ({"data.split_ratio": (1.2, -0.1, -0.1)}, "config.data.split_ratio"),
        ({"data.split_ratio": (0, 0, 0)}, "config.data.split_ratio"),
        ({"model.fusion": True, "model.fusion_stages": (9,)}, "config.model.fusion_stages"),
        ({"model.attention": "cbam", "model.fusion_stages": (0, 2)}, "config.model.fusion_stages"),
        ({"model.fusion": True, "model.fusion_stages": ("two",)}, "config.model.fusion_stages"),
        ({"augment.std": (0.5, -0.5, 0.5)}, "config.augment.std"),
        ({"augment.std": (0.5, math.inf, 0.5)}, "config.augment.std"),
        ({"optim.freeze": "(", "model.name": "efficientnet_test"}, "not a regular expression"),
        ({"optim.freeze": "kernel", "model.name": "efficientnet_test"}, "like stem/kernel"),
        ({"optim.freeze": ".", "model.name": "efficientnet_test"}, "every parameter"),
    ],
)
def test_impossible_combinations_are_named(fields, part):
    expect_error(part, config=changed(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0.0, "steps": 5},
        {"batch_size": 64, "optim.accumulate": 16, "bn_groups": 4},
        {"rcc.min_size": 32, "rcc.max_size": 32, "rcc.eval_size": 32},
        {"rcc.min_size": 1, "rcc.center": 0},
        {"data.patch_size": 224},
        {"data.patch_size": 97, "rcc.center": 0},
        {"data.patch_size": 97, "rcc.center": 97, "rcc.min_size": 97},
        {"data.patch_size": 32, "rcc.center": 0},
        {"data.patch_size": 40, "rcc.enabled": False},
        {"data.split_ratio": (8, 1, 1)},
        {"model.mbconv": "pallas", "batch_size": 512, "bn_groups": 2, "optim.accumulate": 2},
        {"optim.freeze": "stem|block_0[0-2]", "model.name": "efficientnet_test"},
    ],
)
def test_possible_combinations_pass(fields):
    checks.validate(changed(**fields))


def test_a_valid_config_builds_its_network():
    """Building the network raises at a field of config.model that the network does not have."""
    config = quickstart.get_config("model.total_stride=8")
    checks.validate(config)
    network = create(config.model, config.dtype, config.bn_groups)
    shape = jax.eval_shape(
        lambda key: network.init_with_output(key, jnp.zeros((1, 96, 96, 3)), False)[0],
        jax.random.key(0),
    )
    assert shape.shape == (1, config.model.num_classes)


# ---- other --------------------------------------------------------------------------------------


def test_validation_starts_no_device():
    """Several processes validate first. Then JAX connects them, before it starts devices."""
    code = """
import jax
from bef_jax.config import validate
from bef_jax.configs import default

validate(default.get_config("optim.freeze=stem"))
jax.config.update("jax_platforms", "none_such")  # too late for devices that have been started
try:
    jax.devices()
except RuntimeError:
    print("none started")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "none started", done.stderr


def test_flatten_names_every_field():
    config = ConfigDict({"a": 1, "b": {"c": "x", "d": {"e": None}}})
    assert checks.flatten(config) == {"a": 1, "b.c": "x", "b.d.e": None}


def test_an_argument_that_is_a_dict_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"argument 'epochs=\{\}'") as caught:
        default.get_config("epochs={}")
    assert "\n" not in str(caught.value)
