import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from bef_jax import optim
from bef_jax.models import create
from configs import b0
from configs.default import get_config

RATE = 0.1


def make_config(name, **fields):
    """An optimiser without clipping, unless `fields` say otherwise."""
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
    """Parameters after one step per gradient, from those of seed 0."""
    tx = optim.make_optimizer(config, lambda step: RATE)
    params = jax.tree.map(jnp.float32, make_tree(0))
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
    return flatten_dict(params)


def assert_steps(config, gradients, step):
    """Compares with `step(parameter, gradient, decay, memory) -> parameter`, leaf by leaf."""
    actual = take_steps(config, gradients)
    for path, leaf in flatten_dict(make_tree(0)).items():
        decay = config.optim.weight_decay if path[-1] == "kernel" else 0.0
        memory: dict = {}
        for gradient in gradients:
            leaf = step(leaf, flatten_dict(gradient)[path], decay, memory)
        np.testing.assert_allclose(actual[path], leaf, rtol=1e-5, atol=1e-6, err_msg=str(path))


GRADIENTS = [make_tree(seed) for seed in (1, 2, 3)]


# ---- weight decay's mask ------------------------------------------------------------------------


def test_decay_mask_covers_every_parameter_of_a_boosted_network():
    network = create(b0.get_config().model)
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda key: network.init(key, images, False), jax.random.key(0))
    params = flatten_dict(shapes["params"])
    mask = flatten_dict(optim.decay_mask(shapes["params"]))
    assert mask.keys() == params.keys()
    assert {path[-1] for path, decayed in mask.items() if decayed} == {"kernel"}
    # What is left alone are vectors, one number per channel; what is decayed never is.
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


# ---- optimisers ---------------------------------------------------------------------------------


def test_adamw():
    def step(w, g, decay, memory):
        t = memory["t"] = memory.get("t", 0) + 1
        m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
        v = memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        return w - RATE * (adam + decay * w)

    assert_steps(make_config("adamw", weight_decay=0.3), GRADIENTS, step)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd(momentum):
    def step(w, g, decay, memory):
        trace = memory["trace"] = momentum * memory.get("trace", 0) + g + decay * w
        return w - RATE * trace

    assert_steps(make_config("sgd", weight_decay=0.3, momentum=momentum), GRADIENTS, step)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_rmsprop(momentum):
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
def test_clipping_scales_the_whole_gradient_down_to_its_norm(share, scale):
    gradient = GRADIENTS[0]
    fields = {"weight_decay": 0.0, "momentum": 0.0, "clip_norm": share * global_norm(gradient)}
    after = take_steps(make_config("sgd", **fields), [gradient])
    for path, before in flatten_dict(make_tree(0)).items():
        expected = before - RATE * scale * flatten_dict(gradient)[path]
        np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_decay_is_not_clipped(name):
    """Nor does it count for the norm: decay comes after clipping."""
    gradient = jax.tree.map(np.zeros_like, make_tree(0))
    fields = {"weight_decay": 0.5, "momentum": 0.0}
    free = take_steps(make_config(name, **fields), [gradient])
    clipped = take_steps(make_config(name, clip_norm=1e-6, **fields), [gradient])
    before = flatten_dict(make_tree(0))
    for path in before:
        np.testing.assert_array_equal(clipped[path], free[path])
        moved = not np.allclose(free[path], before[path], atol=1e-6)
        assert moved == (path[-1] == "kernel")
