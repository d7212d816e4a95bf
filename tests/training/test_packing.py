"""Tests the packed state of GPUs, on a CPU, against the same training with its leaves apart."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bef_jax import train
from bef_jax.configs import default, quickstart
from bef_jax.data.batches import Batch
from bef_jax.runtime import sharding
from bef_jax.training import optim, packing, state, step
from tests.conftest import SHRUNK


@pytest.fixture
def for_gpu(monkeypatch):
    """Traces and packs as for a GPU, so that a CPU runs what a GPU would."""
    monkeypatch.setattr(sharding, "for_gpu", lambda: True)
    jax.clear_caches()  # what was traced before is not for GPUs
    yield
    jax.clear_caches()


@pytest.fixture
def short_vectors(monkeypatch):
    """Starts a vector after 500 numbers, so that a small network fills several."""
    monkeypatch.setattr(packing, "_LENGTH", 500)


@functools.cache
def shapes(**fields):
    return state.abstract_state(make_config(**fields))


def make_config(**fields):
    config = quickstart.get_config("batch_size=16")
    config.update_from_flattened_dict(fields)
    return config


def filled(tree, seed=0):
    """Random values for the leaves of a tree, none of them negative."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), tree)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# ---- packing ------------------------------------------------------------------------------------


def test_unpacking_undoes_packing(short_vectors):
    whole = filled(shapes())
    packed = packing.pack_state(whole)
    assert packing.is_packed(packed)
    assert not packing.is_packed(whole)
    assert_equal(packing.unpack_state(packed, whole), whole)
    assert packing.with_leaves(packed, make_config()).params.keys() == whole.params.keys()


def test_the_whole_state_is_in_few_vectors_of_the_same_names():
    whole = shapes()
    packed = jax.eval_shape(packing.pack_state, whole)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(whole.params)}
    assert packed.params.keys() == {"0"}
    assert packed.params["0"].keys() == names
    # Parameters, two moments and the average have a vector for each name; the statistics and
    # their average have two; and there are the counts of the schedule, of AdamW and of the step.
    assert len(jax.tree.leaves(packed)) <= 4 * len(names) + 2 * 2 + 3
    assert state.count_params(packed.params) == state.count_params(whole.params)


def test_a_vector_ends_with_the_leaf_that_fills_it(short_vectors):
    tree = {f"layer_{i}": {"kernel": jnp.full((20, 10), i), "bias": jnp.ones(2)} for i in range(6)}
    vectors = packing.pack(tree)
    assert {n: v["kernel"].size for n, v in vectors.items()} == {"0": 600, "1": 600}
    assert vectors["0"]["bias"].size == 12
    np.testing.assert_array_equal(np.unique(vectors["1"]["kernel"]), [3, 4, 5])


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd"])
def test_an_optimiser_updates_vectors_as_it_updates_leaves(name, short_vectors):
    config = make_config(**{"optim.name": name, "optim.clip_norm": 0.5})
    tx = optim.make_optimizer(config, lambda count: 0.1)
    whole = filled(shapes(**{"optim.name": name}))
    grads = filled(whole.params, seed=1)

    @jax.jit
    def update(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    expected = update(grads, whole.opt_state, whole.params)
    packed = packing.pack_state(whole)
    params, opt_state = update(packing.pack(grads), packed.opt_state, packed.params)
    actual = packing.unpack_state(packed.replace(params=params, opt_state=opt_state), whole)
    # The gradient's norm adds the same numbers up in another order.
    check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(check, (actual.params, actual.opt_state), expected)


@pytest.mark.parametrize(
    "fields", [{"optim.freeze": "stem"}, {"optim.layer_decay": 0.9}, {"optim.head_only_steps": 2}]
)
def test_fine_tuning_by_modules_keeps_the_leaves_apart(fields, for_gpu):
    config, mesh = make_config(**fields), sharding.make_mesh()
    whole = state.abstract_state(config)
    assert packing.make_packing(config, mesh).shapes(whole).params.keys() == whole.params.keys()
    assert "0" in packing.make_packing(make_config(), mesh).shapes(shapes()).params


def test_a_cpu_keeps_its_state_as_it_is():
    whole = filled(shapes())
    made = packing.make_packing(make_config(), sharding.make_mesh())
    assert made.pack(whole) is whole
    assert made.unpack(whole) is whole


# ---- training -----------------------------------------------------------------------------------

# Plain gradient descent, because AdamW makes updates of full size from gradients that are nothing
# but rounding errors, such as those of a bias before a norm.
STILL = (
    "batch_size=16,rcc.enabled=False,augment.stain=0.0,augment.stain_shift=0.0,model.dropout=0.0,"
    "optim.name=sgd,optim.learning_rate=1.0,model.name=efficientnet_test"
)


def take_steps(count, packs, **fields):
    """The losses and the norms of the gradients of some steps, and the last variables."""
    config = default.get_config(STILL)
    config.update_from_flattened_dict(fields)
    images = np.random.default_rng(0).integers(0, 256, (16, 48, 48, 3), dtype=np.uint8)
    batch = Batch(jnp.asarray(images), jnp.asarray(np.arange(16) % 2, jnp.int32))
    like = state.abstract_state(config)
    current = state.create_state(config, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    current = packing.pack_state(current) if packs else current
    train_step = jax.jit(step.make_train_step(config))
    metrics = []
    for _ in range(count):
        current, one = train_step(current, batch, jax.random.key(0), 0.05)
        metrics.append([float(one["loss"]), float(one["grad_norm"])])
    last = packing.unpack_state(current, like) if packs else current
    return np.array(metrics), (last.params, last.batch_stats, last.ema)


@pytest.fixture(scope="module")
def as_on_cpu():
    return {dtype: take_steps(10, packs=False, dtype=dtype) for dtype in ("float32", "bfloat16")}


def assert_near(actual, expected):
    metrics, variables = actual
    expected_metrics, expected_variables = expected
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-5)
    pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(expected_variables), strict=True)
    for a, e in pairs:
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * max(0.1, np.abs(e).max()))


def test_ten_steps_are_those_of_the_cpu(as_on_cpu, for_gpu):
    assert_near(take_steps(10, packs=True), as_on_cpu["float32"])


def test_ten_steps_in_bfloat16_are_as_near_to_float32(as_on_cpu, for_gpu):
    exact = as_on_cpu["float32"][0]
    theirs = np.abs(as_on_cpu["bfloat16"][0] / exact - 1)
    ours = np.abs(take_steps(10, packs=True, dtype="bfloat16")[0] / exact - 1)
    assert theirs.mean() < 0.1
    assert ours.mean() < 1.5 * theirs.mean()


def test_steps_with_accumulation_groups_and_remat_are_those_of_the_cpu(monkeypatch):
    fields = {
        "optim.accumulate": 2, "bn_groups": 2, "model.remat": "block", "model.attention": "cbam",
    }  # fmt: skip
    expected = take_steps(2, packs=False, **fields)
    monkeypatch.setattr(sharding, "for_gpu", lambda: True)
    jax.clear_caches()
    assert_near(take_steps(2, packs=True, **fields), expected)


# ---- a whole run --------------------------------------------------------------------------------

# Two steps in a call, so that vectors pass from step to step in a loop, too.
CALLS = {"steps_per_call": 2, "data.placement": "device"}


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory, data_dir):
    """The workdir of a run that packed its state, and its summary; trained once for all tests."""
    workdir = tmp_path_factory.mktemp("packed")
    config = quickstart.get_config()
    config.update_from_flattened_dict({**SHRUNK, "data.dir": str(data_dir), **CALLS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "for_gpu", lambda: True)
        patch.setattr(packing, "_LENGTH", 500)
        jax.clear_caches()
        summary = train.train_and_evaluate(config, workdir)
    jax.clear_caches()
    return workdir, summary


def copy_step_4(workdir, to):
    """Leaves what a run leaves that was stopped after step 4."""
    shutil.copytree(workdir / "checkpoints" / "4", to / "checkpoints" / "4")


def test_a_packed_run_resumes_to_the_same_bits(
    packed_run, small_config, for_gpu, short_vectors, tmp_path
):
    workdir, summary = packed_run
    copy_step_4(workdir, tmp_path)
    resumed = train.train_and_evaluate(small_config(**CALLS), tmp_path)
    assert resumed["params_digest"] == summary["params_digest"]
    assert resumed["valid"] == summary["valid"]


def test_another_machine_resumes_a_packed_run(packed_run, small_config, tmp_path):
    workdir, summary = packed_run
    copy_step_4(workdir, tmp_path)
    resumed = train.train_and_evaluate(small_config(), tmp_path)
    assert resumed.keys() == summary.keys()
    assert resumed["params"] == summary["params"]
    # The last two steps differ by rounding, so the bits do, too.
    assert resumed["valid"]["loss"] == pytest.approx(summary["valid"]["loss"], rel=0.01)
