"""Optimisers against updates written in NumPy, and schedules against their closed forms."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from bef_jax.configs import b0, quickstart
from bef_jax.configs.default import get_config
from bef_jax.models import create, parameter_paths
from bef_jax.training import optim

RATE = 0.1


def make_config(name, **fields):
    """Returns a config without clipping, unless `fields` say otherwise."""
    config = get_config()
    config.optim.update({"name": name, "clip_norm": 0.0, **fields})
    return config


def make_tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
        "norm": {"scale": rng.normal(size=2), "bias": rng.normal(size=2)},
    }


def take_steps(config, gradients):
    """Returns the parameters of seed 0 after one step per gradient."""
    tx = optim.make_optimizer(config, lambda step: RATE)
    params = jax.tree.map(jnp.float32, make_tree(0))
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
    return flatten_dict(params)


def assert_steps(config, gradients, step):
    """Compares `take_steps`, leaf by leaf, with step(parameter, gradient, decay, memory)."""
    actual = take_steps(config, gradients)
    for path, leaf in flatten_dict(make_tree(0)).items():
        decay = config.optim.weight_decay if path[-1] == "kernel" else 0.0
        memory: dict = {}
        for gradient in gradients:
            leaf = step(leaf, flatten_dict(gradient)[path], decay, memory)
        np.testing.assert_allclose(actual[path], leaf, rtol=1e-5, atol=1e-6, err_msg=str(path))


GRADIENTS = [make_tree(seed) for seed in (1, 2, 3)]


# ---- which parameters decay ---------------------------------------------------------------------


def test_decay_mask_covers_every_parameter_of_a_boosted_network():
    network = create(b0.get_config().model)
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda key: network.init(key, images, False), jax.random.key(0))
    params = flatten_dict(shapes["params"])
    mask = flatten_dict(optim.decay_mask(shapes["params"]))
    assert mask.keys() == params.keys()
    assert {path[-1] for path, decayed in mask.items() if decayed} == {"kernel"}
    # All vectors (one number per channel) are left alone, and everything else decays.
    assert all(decayed == (len(params[path].shape) > 1) for path, decayed in mask.items())


def test_decay_mask_refuses_a_name_that_it_does_not_know():
    with pytest.raises(ValueError, match="mystery"):
        optim.decay_mask({"block": {"kernel": 1, "mystery": 2}})


# ---- schedule -----------------------------------------------------------------------------------


def test_schedule_is_a_warm_up_and_half_a_cosine():
    config = get_config("batch_size=64")
    config.optim.update({"learning_rate": 4e-3, "warmup_epochs": 2.0, "final_fraction": 0.01})
    schedule = optim.make_schedule(config, steps=100, steps_per_epoch=10)
    peak, end = 4e-3 * 64 / 256, 4e-3 * 64 / 256 * 0.01

    def closed_form(step):
        if step < 20:
            return peak * step / 20
        return end + (peak - end) * (1 + math.cos(math.pi * (step - 20) / 80)) / 2

    for step in (0, 1, 10, 19, 20, 21, 40, 60, 80, 99, 100, 130):
        assert schedule(step) == pytest.approx(closed_form(min(step, 100)), rel=1e-5, abs=1e-9)


def test_schedule_without_warm_up_starts_at_the_peak():
    config = get_config("batch_size=256,optim.learning_rate=0.5,optim.warmup_epochs=0.0")
    schedule = optim.make_schedule(config, steps=10, steps_per_epoch=5)
    assert schedule(0) == pytest.approx(0.5)
    assert schedule(1) < 0.5


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_schedule_of_a_run_shorter_than_its_warm_up_is_finite_and_moves(steps):
    config = get_config("batch_size=256,optim.learning_rate=0.5,optim.warmup_epochs=3.0")
    schedule = optim.make_schedule(config, steps, steps_per_epoch=10)
    rates = [float(schedule(step)) for step in range(steps + 1)]
    assert np.isfinite(rates).all()
    assert max(rates) == pytest.approx(0.5)


def test_each_call_has_the_rates_of_its_steps():
    rates = list(optim.learning_rates(lambda step: 0.5 * step, 4, [1, 3, 2]))
    assert {rate.dtype for rate in rates} == {np.dtype("float32")}
    assert [rate.tolist() for rate in rates] == [[2.0], [2.5, 3.0, 3.5], [4.0, 4.5]]


# ---- optimisers ---------------------------------------------------------------------------------


def test_adamw_follows_its_formula():
    def step(w, g, decay, memory):
        t = memory["t"] = memory.get("t", 0) + 1
        m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
        v = memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        return w - RATE * (adam + decay * w)

    assert_steps(make_config("adamw", weight_decay=0.3), GRADIENTS, step)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_follows_its_formula(momentum):
    def step(w, g, decay, memory):
        trace = memory["trace"] = momentum * memory.get("trace", 0) + g + decay * w
        return w - RATE * trace

    assert_steps(make_config("sgd", weight_decay=0.3, momentum=momentum), GRADIENTS, step)


@pytest.mark.parametrize(("name", "moments"), [("sgd", 0), ("rmsprop", 1)])
def test_momentum_of_0_keeps_no_trace(name, moments):
    tx = optim.make_optimizer(make_config(name, momentum=0.0), lambda _: RATE)
    params = jax.tree.map(jnp.float32, make_tree(0))
    arrays = [leaf for leaf in jax.tree.leaves(tx.init(params)) if leaf.ndim]
    assert len(arrays) == moments * len(jax.tree.leaves(params))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_rmsprop_follows_its_formula(momentum):
    def step(w, g, decay, memory):
        g = g + decay * w
        v = memory["v"] = 0.9 * memory.get("v", 0) + 0.1 * g**2
        trace = momentum * memory.get("trace", 0) + RATE * g / np.sqrt(v + 1e-3)
        memory["trace"] = trace
        return w - trace

    assert_steps(make_config("rmsprop", weight_decay=0.3, momentum=momentum), GRADIENTS, step)


# ---- clipping -----------------------------------------------------------------------------------


def global_norm(tree):
    return math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize(("share", "scale"), [(0.25, 0.25), (4.0, 1.0)])
def test_clipping_scales_a_gradient_down_to_clip_norm(share, scale):
    gradient = GRADIENTS[0]
    fields = {"weight_decay": 0.0, "momentum": 0.0, "clip_norm": share * global_norm(gradient)}
    after = take_steps(make_config("sgd", **fields), [gradient])
    for path, before in flatten_dict(make_tree(0)).items():
        expected = before - RATE * scale * flatten_dict(gradient)[path]
        np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_decay_is_not_clipped(name):
    """Decay does not count for the norm either, because it comes after clipping."""
    gradient = jax.tree.map(np.zeros_like, make_tree(0))
    fields = {"weight_decay": 0.5, "momentum": 0.0}
    free = take_steps(make_config(name, **fields), [gradient])
    clipped = take_steps(make_config(name, clip_norm=1e-6, **fields), [gradient])
    before = flatten_dict(make_tree(0))
    for path in before:
        np.testing.assert_array_equal(clipped[path], free[path])
        moved = not np.allclose(free[path], before[path], atol=1e-6)
        assert moved == (path[-1] == "kernel")


# ---- fine-tuning --------------------------------------------------------------------------------

LAYERS = ("stem", "block_00", "head", "classifier")


def make_network(seed, layers=LAYERS):
    """Returns a kernel for each layer, all of different shapes, and normalisations."""
    rng = np.random.default_rng(seed)
    shapes = {layer: (3, i) for i, layer in enumerate(LAYERS, 2)}
    tree = {layer: {"kernel": rng.normal(size=shape)} for layer, shape in shapes.items()}
    tree |= {f"{layer}_norm": {"scale": rng.normal(size=3)} for layer in LAYERS[:3]}
    return {name: tree[name] for name in tree if name.removesuffix("_norm") in layers}


def fine_tune(config, rate=RATE, steps=3, layers=LAYERS):
    """Returns the optimiser's state, and the parameters by name before and after each step."""
    tx = optim.make_optimizer(config, lambda step: rate)
    params = jax.tree.map(jnp.float32, make_network(0, layers))
    state, seen = tx.init(params), [flatten_dict(params, sep="/")]
    traces = []

    @jax.jit
    def step(gradient, state, params):
        traces.append(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(1, steps + 1):
        gradient = jax.tree.map(jnp.float32, make_network(seed, layers))
        params, state = step(gradient, state, params)
        seen.append(flatten_dict(params, sep="/"))
    assert len(traces) == 1  # one program takes all steps
    return state, seen


def test_layer_multipliers_match_a_list_made_by_hand():
    expected = {
        "stem/kernel": 0.0625,
        "stem_norm/scale": 0.0625,
        "block_00/expand_conv/kernel": 0.125,
        "attention_2/channel/hidden/kernel": 1.0,
        "block_01/project_norm/bias": 0.25,
        "attention_7/spatial/bias": 1.0,
        "head/kernel": 0.5,
        "head_norm/bias": 0.5,
        "classifier/bias": 1.0,
    }
    assert optim.layer_multipliers(list(expected), 0.5) == expected


def test_the_order_of_use_gives_the_depth_of_layers():
    """The depth of a layer with an unknown name is its place in the order of use."""
    paths = ["z/kernel", "z_norm/scale", "stage_10/unit/kernel", "stage_2/kernel", "a/kernel"]
    multipliers = optim.layer_multipliers([*paths, "classifier/kernel"], 0.5)
    assert list(multipliers.values()) == [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]


def test_parameter_paths_are_those_of_the_network_from_stem_to_classifier():
    model = quickstart.get_config().model
    shapes = jax.eval_shape(
        lambda key: create(model).init(key, jnp.zeros((1, 32, 32, 3)), False), jax.random.key(0)
    )
    paths = parameter_paths(model)
    assert sorted(paths) == sorted(flatten_dict(shapes["params"], sep="/"))
    modules = list(dict.fromkeys(path.split("/")[0] for path in paths))
    assert modules == [
        "stem", "stem_norm", "block_00", "block_01", "attention_2", "block_02", "attention_3",
        "block_03", "attention_4", "block_04", "attention_5", "head", "head_norm", "classifier",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd"])
def test_layer_decay_is_a_learning_rate_for_each_layer(name, monkeypatch):
    paths = flatten_dict(make_network(0), sep="/")
    monkeypatch.setattr(optim, "parameter_paths", lambda model: paths)
    _, decayed = fine_tune(make_config(name, weight_decay=0.3, layer_decay=0.5))
    for layer, multiplier in zip(LAYERS, (0.125, 0.25, 0.5, 1.0), strict=True):
        plain = make_config(name, weight_decay=0.3)
        _, expected = fine_tune(plain, RATE * multiplier, layers=[layer])
        for path, values in expected[-1].items():
            np.testing.assert_allclose(decayed[-1][path], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd"])
def test_frozen_parameters_stay_and_have_no_state_in_the_optimiser(name):
    config = make_config(name, clip_norm=0.1, weight_decay=0.3, freeze="stem|block_00/kernel")
    state, seen = fine_tune(config)
    for path in ("stem/kernel", "stem_norm/scale", "block_00/kernel"):
        np.testing.assert_array_equal(seen[-1][path], seen[0][path])
    assert not np.array_equal(seen[-1]["block_00_norm/scale"], seen[0]["block_00_norm/scale"])
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert shapes.isdisjoint({(3, 2), (3, 3)})
    assert (3, 4) in shapes


def test_other_parameters_learn_as_if_the_frozen_ones_did_not_exist():
    """This fails if frozen parameters count for the norm of clipping."""
    fields = {"clip_norm": 0.1, "weight_decay": 0.3}
    _, seen = fine_tune(make_config("sgd", freeze="stem|block_00", **fields))
    _, expected = fine_tune(make_config("sgd", **fields), layers=["head", "classifier"])
    for path, values in expected[-1].items():
        np.testing.assert_allclose(seen[-1][path], values, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd"])
def test_only_the_classifier_learns_in_the_first_steps(name):
    _, seen = fine_tune(make_config(name, head_only_steps=2))
    for path in seen[0]:
        moved = [not np.array_equal(a[path], b[path]) for a, b in itertools.pairwise(seen)]
        assert moved == ([True] * 3 if path.startswith("classifier") else [False, False, True])


def test_no_gradient_flows_into_frozen_parameters():
    def loss(params):
        params = optim.stop_frozen(params, "stem/kernel")
        return params["stem"]["kernel"] * params["stem"]["bias"]

    gradient = jax.grad(loss)({"stem": {"kernel": 2.0, "bias": 3.0}})
    assert gradient == {"stem": {"kernel": 0.0, "bias": 2.0}}
