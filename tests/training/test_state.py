"""The training state: its average against the formula, and its digest against hashlib."""

import hashlib
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bef_jax.configs.default import get_config
from bef_jax.runtime import sharding
from bef_jax.training import state
from tests.conftest import ROOT


def small_config(**fields):
    config = get_config("model.name=efficientnet_test,batch_size=4")
    config.update_from_flattened_dict(fields)
    return config


def describe(tree):
    """Returns {path: (shape, dtype)}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}


# ---- creation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def created():
    return state.create_state(small_config(), sharding.replicated(sharding.make_mesh()))


def test_abstract_state_has_the_shapes_and_dtypes_of_a_created_one(created):
    assert describe(state.abstract_state(small_config())) == describe(created)


def test_a_fresh_state_is_at_step_0_and_its_average_equals_the_parameters(created):
    assert created.step == 0
    assert created.step.dtype == jnp.int32
    assert created.ema.keys() == {"params", "batch_stats"}
    for ours, average in (
        (created.params, created.ema["params"]),
        (created.batch_stats, created.ema["batch_stats"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, average)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(created))
    sizes = [math.prod(shape) for shape, _ in describe(created.params).values()]
    assert state.count_params(created.params) == sum(sizes)


def test_two_seeds_give_different_numbers_but_share_one_program(created, caplog):
    with jax.log_compiles():
        other = state.create_state(small_config(seed=1), created.step.sharding)
    kernels = (each.params["stem"]["kernel"] for each in (created, other))
    assert not np.array_equal(*kernels)
    assert "compilation cache hit for 'jit__init_state'" in caplog.text


def test_average_shares_no_memory_with_the_parameters(created):
    """The step donates both, so it would donate a shared buffer twice."""
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(created) if leaf.size > 1]
    assert len(set(pointers)) == len(pointers)


def test_the_shapes_of_a_state_are_found_without_starting_the_devices():
    """Once JAX has its devices, it takes no other number of them."""
    code = (
        "import jax; from bef_jax.configs.default import get_config\n"
        "from bef_jax.training.state import abstract_state\n"
        "abstract_state(get_config('model.name=efficientnet_test'))\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(jax.device_count())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert (result.stdout, result.returncode) == ("3\n", 0), result.stderr


def test_without_an_average_evaluation_uses_the_parameters():
    abstract = state.abstract_state(small_config(ema_decay=0.0))
    assert abstract.ema is None
    assert abstract.eval_variables()["params"] is abstract.params
    assert abstract.eval_variables()["batch_stats"] is abstract.batch_stats
    averaged = state.abstract_state(small_config())
    assert averaged.eval_variables() is averaged.ema


# ---- average ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "decay", "keep"),
    [(0, 0.999, 0.1), (8, 0.999, 0.5), (8, 0.3, 0.3), (10**6, 0.999, 0.999)],
)
def test_update_ema_follows_its_formula(step, decay, keep):
    average, new = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([5.0, -2.0])}
    moved = jax.jit(state.update_ema, static_argnums=3)(average, new, jnp.int32(step), decay)
    expected = keep * np.array([1.0, 2.0]) + (1 - keep) * np.array([5.0, -2.0])
    assert moved["a"].dtype == jnp.float32
    np.testing.assert_allclose(moved["a"], expected, rtol=1e-6)


# ---- digest -------------------------------------------------------------------------------------


def make_trees():
    params = {
        "b": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(2)},
        "a": jnp.ones(1),
    }
    return params, {"b": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}  # fmt: skip


def reverse(tree):
    if not isinstance(tree, dict):
        return tree
    return {key: reverse(tree[key]) for key in reversed(tree)}


def test_digest_does_not_depend_on_the_order_of_a_dict():
    params, stats = make_trees()
    assert list(reverse(params)) != list(params)
    assert state.params_digest(params, stats) == state.params_digest(
        reverse(params), reverse(stats)
    )


def test_digest_changes_with_any_leaf():
    flat = flatten_dict({"params": make_trees()[0], "stats": make_trees()[1]})
    digests = {state.params_digest(*make_trees())}
    for path in flat:
        # Change the last bit of one number.
        changed = np.array(flat[path])
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
        tree = unflatten_dict(flat | {path: changed})
        digests.add(state.params_digest(tree["params"], tree["stats"]))
    assert len(digests) == 1 + len(flat)


def test_digest_changes_if_two_leaves_are_swapped():
    params, stats = make_trees()
    swapped = {"b": {"mean": stats["b"]["var"], "var": stats["b"]["mean"]}}
    assert state.params_digest(params, stats) != state.params_digest(params, swapped)


def test_digest_is_sha256_of_sorted_paths_and_bytes():
    """The digest is stable API, so names and values are written here, not taken from the code."""
    digest = hashlib.sha256()
    for name, values in (
        ("['batch_stats']['b']['mean']", [0, 0]),
        ("['batch_stats']['b']['var']", [1, 1]),
        ("['params']['a']", [1]),
        ("['params']['b']['bias']", [0, 0]),
        ("['params']['b']['kernel']", [0, 1, 2, 3, 4, 5]),
    ):
        digest.update(name.encode() + np.array(values, "<f4").tobytes())
    assert state.params_digest(*make_trees()) == digest.hexdigest()
