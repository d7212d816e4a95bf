"""A run that starts from saved weights, compared with its source and with a fresh state."""

import os
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from bef_jax.config import as_json
from bef_jax.configs.default import get_config
from bef_jax.errors import UserError
from bef_jax.runtime import sharding
from bef_jax.training import pretrained, state
from bef_jax.training.checkpoint import Checkpoints

SOURCE = "model.name=efficientnet_test,model.num_classes=3,ema_decay=0.0,seed=1"
BOOSTED = "model.name=efficientnet_test,model.attention=cbam,model.fusion=True"
EVERYWHERE = sharding.replicated(sharding.make_mesh())


def shapes(**sizes):
    """Returns stand-ins for arrays; stem=(3, 2) gives 'params/stem/kernel' that shape."""
    named = {f"params/{name}/kernel": size for name, size in sizes.items()}
    return {name: types.SimpleNamespace(shape=size) for name, size in named.items()}


def save(folder, config, source):
    """Saves a state, and returns the checkpoint's folder."""
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(7, source, {"config": as_json(config)}, None)
    checkpoints.close()
    return folder / "checkpoints" / "7"


def equal_leaves(one, other):
    """Returns {parameter: whether both trees have equal values there}."""
    return flatten_dict(jax.tree.map(np.array_equal, one, other), sep="/")


def test_a_plain_network_starts_a_boosted_one(tmp_path):
    """The source has other classes and no average; what it lacks starts as in a fresh state."""
    config, source_config = get_config(BOOSTED), get_config(SOURCE)
    source = state.create_state(source_config, EVERYWHERE)
    # Make the statistics differ from the zeros and ones that a fresh state has.
    source = source.replace(batch_stats=jax.tree.map(lambda x: x + 0.5, source.batch_stats))
    config.init_from = str(save(tmp_path, source_config, source))
    started, renewed = pretrained.start(config, EVERYWHERE)
    fresh = state.create_state(config, EVERYWHERE)
    trunk = [name for name in source.params if name != "classifier"]
    new = [name for name in fresh.params if name not in trunk]
    assert "attention_3" in new
    assert renewed == sorted(new)
    for part, names, origin in (("params", trunk, source), ("params", new, fresh),
                                ("batch_stats", source.batch_stats, source)):  # fmt: skip
        for name in names:
            pair = getattr(started, part)[name], getattr(origin, part)[name]
            assert all(equal_leaves(*pair).values()), name
    assert started.step == 0
    assert all(equal_leaves(started.ema["params"], started.params).values())
    assert all(equal_leaves(started.ema["batch_stats"], started.batch_stats).values())
    assert jax.tree.all(jax.tree.map(np.array_equal, started.opt_state, fresh.opt_state))


@pytest.mark.parametrize(
    ("classes", "fresh"),
    [
        (("stroma", "tumour"), []),
        (("tumour", "stroma"), ["classifier"]),  # the same names, with other numbers
        (("mucus", "tumour"), ["classifier"]),
    ],
)
def test_a_checkpoint_of_other_classes_gives_no_classifier(classes, fresh, tmp_path, caplog):
    config = get_config("model.name=efficientnet_test,ema_decay=0.0,seed=1")
    config.data.classes = ("stroma", "tumour")
    source = state.create_state(config, EVERYWHERE)
    config.init_from = str(save(tmp_path, config, source))
    config.seed, config.data.classes = 2, classes
    with caplog.at_level("INFO", "bef_jax"):
        started, renewed = pretrained.start(config, EVERYWHERE)
    assert renewed == fresh
    assert f"fresh: {', '.join(fresh) or 'nothing'}" in caplog.text
    equal = jax.tree.map(np.array_equal, started.params, source.params)
    assert equal["classifier"]["kernel"] == (not fresh)
    assert jax.tree.all({name: x for name, x in equal.items() if name != "classifier"})


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ("rcc.center=0", "config.rcc.center was 32 in the source, is 0 now"),
        ("data.patch_size=224", "config.data.patch_size was 96 in the source, is 224 now"),
        ("data.mpp=0.25", "config.data.mpp was 0.972 in the source, is 0.25 now: "),
        ("data.mpp=1.0", None),  # within 8 %, like two scanners
        ("data.source=npz", None),  # which does not say its scale
    ],
)
def test_other_inputs_are_warned_of(fields, line, caplog):
    """The source is PCam, whose scale is known although data.mpp is 0."""
    pretrained._log_differences(ConfigDict(as_json(get_config())), get_config(fields))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith(line) if line else not lines


def test_another_classifier_and_attention_that_the_source_lacks_are_fresh():
    source = shapes(stem=(3, 2), attention_2=(4, 4), classifier=(9, 1000))
    wanted = shapes(stem=(3, 2), attention_2=(4, 4), attention_3=(5, 5), classifier=(9, 2))
    assert pretrained.fresh_parts(source, wanted, "x") == ["attention_3", "classifier"]
    assert pretrained.fresh_parts(wanted, wanted, "x") == []


def test_all_that_does_not_fit_is_listed():
    source = shapes(stem=(3, 2), block_01=(4, 4), attention_2=(1, 1), classifier=(9, 9))
    wanted = shapes(stem=(3, 3), block_00=(4, 4), attention_2=(2, 2), classifier=(9, 2))
    with pytest.raises(UserError) as caught:
        pretrained.fresh_parts(source, wanted, "weights.pth")
    assert str(caught.value) == (
        "config.init_from=weights.pth is not of this network: "
        "params/attention_2/kernel is (1, 1), not (2, 2), params/block_00/kernel is missing, "
        "params/block_01/kernel is unexpected, params/stem/kernel is (3, 2), not (3, 3)"
    )


def test_a_long_list_of_mismatches_is_cut():
    wanted = shapes(**{f"block_{i:02d}": (1, 1) for i in range(30)})
    with pytest.raises(UserError, match=r"block_19/kernel is missing and 10 more$"):
        pretrained.fresh_parts({}, wanted, "x")


def test_a_folder_that_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        pretrained.find(str(tmp_path))


def test_a_special_file_or_a_damaged_config_as_source_is_named_at_once(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth: is a FIFO"):
        pretrained.find(str(tmp_path / "weights.pth"))
    (tmp_path / "0" / "run").mkdir(parents=True)
    (tmp_path / "0" / "run" / "metadata").write_text('{"config": {"model": {"gone": 1}}}')
    with pytest.raises(UserError, match=r"0: config\.model\.gone is unknown"):
        pretrained.find(str(tmp_path / "0"))
