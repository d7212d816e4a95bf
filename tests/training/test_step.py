import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.utils.class_weight import compute_class_weight

from bef_jax import models
from bef_jax.configs.default import get_config
from bef_jax.data.batches import Batch, Selection
from bef_jax.models.layers import BatchNorm, Conv, global_pool
from bef_jax.runtime import sharding
from bef_jax.training import state, step

PIXELS = 16  # without RCC, whatever size comes in is what the network sees
STILL = (
    "batch_size=8,rcc.enabled=False,augment.flips=False,augment.stain=0.0,augment.stain_shift=0.0,"
    "model.dropout=0.0,optim.name=sgd,optim.momentum=0.0,optim.weight_decay=0.0,optim.clip_norm=0.0"
)
RATE = 0.5
KEY = jax.random.key(0)


class Tiny(nn.Module):
    """What a step needs of a network, in a second of compilation: statistics, dropout, logits."""

    num_classes: int
    dropout: float
    bn_momentum: float
    bn_groups: int

    @nn.compact
    def __call__(self, images, train=False):
        x = Conv(8, 3, stride=2, name="stem")(images)
        x = nn.silu(BatchNorm(self.bn_momentum, groups=self.bn_groups, name="norm")(x, train))
        x = nn.Dropout(self.dropout, deterministic=not train)(global_pool(x))
        return nn.Dense(self.num_classes, name="classifier")(x)


def tiny(num_classes, dropout, bn_momentum, bn_groups, **_):
    return Tiny(num_classes, dropout, bn_momentum, bn_groups)


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setitem(models.REGISTRY, "efficientnet_b0", tiny)


def make_config(**fields):
    config = get_config(STILL)
    config.update_from_flattened_dict(fields)
    return config


@functools.cache
def make_state(seed=0):
    """Random variables without the compilation of `create_state`; sgd keeps no memory."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return noise * np.sqrt(2 / np.prod(leaf.shape[:-1])).astype(np.float32)
        return 0.1 * noise + (name in ("scale", "var"))

    shapes = state.abstract_state(make_config())
    draw = functools.partial(jax.tree_util.tree_map_with_path, value)
    params, stats = draw(shapes.params), draw(shapes.batch_stats)
    optimiser = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.opt_state)
    ema = {"params": draw(shapes.params), "batch_stats": stats}
    return state.TrainState(jnp.int32(5), params, stats, ema, optimiser)


def make_batch(n=8):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n, PIXELS, PIXELS, 3), dtype=np.uint8)
    # Rows of very different brightness, so that it matters with which others a row is normalised.
    images = images // np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    return Batch(jnp.asarray(images), jnp.asarray(np.arange(n) % 3 == 0, jnp.int32))


def take(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


@functools.cache
def compiled(fields=()):
    config = make_config(**dict(fields))
    return jax.jit(step.make_train_step(config))


def train(batch, at=None, seed=0, **fields):
    before = make_state() if at is None else make_state().replace(step=jnp.int32(at))
    return compiled(tuple(fields.items()))(before, batch, jax.random.key(seed), RATE)


def difference(after):
    return jax.tree.map(lambda new, old: np.asarray(new - old), after.params, make_state().params)


def assert_close(actual, expected, atol):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=atol)


# ---- loss ---------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_scipys(classes, smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(7, classes)) * 5, rng.integers(0, classes, 7)
    targets = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    expected = -(targets * log_softmax(logits, -1)).sum(-1).mean()
    actual = step.cross_entropy(jnp.float32(logits), jnp.asarray(labels), smoothing)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_of_great_logits_is_finite():
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    assert step.cross_entropy(logits, jnp.array([1, 1]), 0.0) == pytest.approx(1e4)


def test_weights_are_scikit_learns_and_their_mean_is_1(caplog):
    labels = np.repeat([0, 1, 3], [50, 5, 20])
    config = make_config(**{"model.num_classes": 4, "data.class_weights": "balanced"})
    with caplog.at_level("INFO"):
        weights = step.class_weights(config, labels.astype(np.uint8))
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(weights[[0, 1, 3]], expected, rtol=1e-6)
    assert np.isfinite(weights[2])  # no patch has this class
    assert weights[labels].mean() == pytest.approx(1)
    assert "0 0.5, 1 5, " in caplog.text


def test_weights_beside_balanced_draws_are_warned_of(caplog):
    fields = {"data.class_weights": "balanced", "data.sampling": "balanced"}
    step.class_weights(make_config(**fields), np.array([0, 0, 1]))
    assert "do too much; keep one" in caplog.text


def test_no_weights_unless_they_are_asked_for():
    assert step.class_weights(make_config(), np.array([0, 0, 1])) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_loss_is_that_of_a_loop(smoothing):
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=(7, 3)) * 5, rng.integers(0, 3, 7), [0.5, 2.0, 4.0]
    total = 0.0
    for row, label in zip(log_softmax(logits, -1), labels, strict=True):
        targets = (1 - smoothing) * np.eye(3)[label] + smoothing / 3
        total -= weights[label] * (targets * row).sum()
    weights = np.float32(weights)
    actual = step.cross_entropy(jnp.float32(logits), jnp.asarray(labels), smoothing, weights)
    assert actual == pytest.approx(total / 7, rel=1e-5)


def test_weights_are_as_if_patches_were_repeated():
    """Six of class 0 and two of class 1 weigh 2/3 and 2, as if each of class 1 came three times."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(8, 5)), np.repeat([0, 1], [6, 2])
    kernel = jnp.float32(rng.normal(size=(5, 2)))
    rows = np.repeat(np.arange(8), [1] * 6 + [3] * 2)
    weights = step.class_weights(make_config(**{"data.class_weights": "balanced"}), labels)

    def gradient(rows, weights):
        inputs, targets = jnp.float32(features[rows]), jnp.asarray(labels[rows])
        return jax.grad(lambda x: step.cross_entropy(inputs @ x, targets, 0.1, weights))(kernel)

    weighted = gradient(np.arange(8), weights)
    np.testing.assert_allclose(weighted, gradient(rows, None), rtol=1e-5, atol=1e-7)
    assert not np.allclose(weighted, gradient(np.arange(8), None), atol=1e-2)


# ---- one step -----------------------------------------------------------------------------------


def network_outputs(config, batch):
    """Logits and batch statistics of a training pass, by the model alone."""
    before = make_state()
    mean, std = np.array(config.augment.mean), np.array(config.augment.std)
    images = np.float32((np.asarray(batch.images) / 255 - mean) / std)
    network = models.create(config.model, config.dtype, config.bn_groups)
    logits, updates = jax.jit(
        functools.partial(network.apply, train=True, mutable=["batch_stats"])
    )({"params": before.params, "batch_stats": before.batch_stats}, images)
    return np.asarray(logits), updates["batch_stats"]


def test_metrics_and_the_next_state():
    batch = make_batch()
    after, metrics = train(batch)
    logits, stats = network_outputs(make_config(), batch)
    labels = np.asarray(batch.labels)
    loss = -log_softmax(np.float64(logits), -1)[np.arange(8), labels].mean()
    assert metrics.keys() == {"loss", "accuracy", "grad_norm", "learning_rate"}
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    assert {value.shape for value in metrics.values()} == {()}
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["accuracy"] == np.mean(logits.argmax(-1) == labels)
    assert metrics["learning_rate"] == RATE
    assert after.step == 6
    assert_close(after.batch_stats, stats, 1e-4)


def test_the_gradient_norm_is_that_of_the_gradient():
    batch = make_batch()
    after, metrics = train(batch)
    gradients = jax.tree.map(lambda x: -x / RATE, difference(after))
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradients)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    # That of the classifier's bias in closed form: softmax minus one-hot.
    logits, _ = network_outputs(make_config(), batch)
    residual = np.exp(log_softmax(logits, -1)) - np.eye(2)[np.asarray(batch.labels)]
    np.testing.assert_allclose(gradients["classifier"]["bias"], residual.mean(0), atol=1e-4)


def test_average_follows_parameters_and_statistics():
    before, (after, _) = make_state(), train(make_batch())
    keep = (1 + 5) / (10 + 5)
    for name, new in (("params", after.params), ("batch_stats", after.batch_stats)):
        expected = jax.tree.map(lambda old, x: keep * old + (1 - keep) * x, before.ema[name], new)
        assert_close(after.ema[name], expected, 1e-5)


def test_label_smoothing_enters_the_loss():
    batch = make_batch()
    _, metrics = train(batch, label_smoothing=0.2)
    logits, _ = network_outputs(make_config(), batch)
    targets = 0.8 * np.eye(2)[np.asarray(batch.labels)] + 0.1
    expected = -(targets * log_softmax(np.float64(logits), -1)).sum(-1).mean()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_enter_the_loss_and_the_gradient(accumulate):
    batch, weights = make_batch(), np.float32([0.25, 3.0])
    config = make_config(**{"optim.accumulate": accumulate})
    train_step = jax.jit(step.make_train_step(config))
    after, metrics = train_step(make_state(), batch, KEY, RATE, weights)
    loss, residuals = [], []
    for first in range(accumulate):
        part = take(batch, np.s_[first::accumulate])
        logits, _ = network_outputs(make_config(), part)
        scores, labels = log_softmax(np.float64(logits), -1), np.asarray(part.labels)
        loss.append(-(weights[labels] * scores[np.arange(len(labels)), labels]).mean())
        residuals.append((weights[labels, None] * (np.exp(scores) - np.eye(2)[labels])).mean(0))
    assert metrics["loss"] == pytest.approx(np.mean(loss), rel=1e-4)
    bias = -difference(after)["classifier"]["bias"] / RATE
    np.testing.assert_allclose(bias, np.mean(residuals, 0), atol=1e-4)


def test_a_step_is_a_function_of_seed_and_step():
    batch, random = make_batch(), {"model.dropout": 0.5, "augment.flips": True}
    losses = [float(train(batch, at=at, **random)[1]["loss"]) for at in (5, 6, 7, 5)]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3
    assert float(train(batch, at=5, seed=1, **random)[1]["loss"]) not in losses


def test_seeds_share_one_program():
    # With dropout, because a step that draws nothing has no key in its program: no seed matters.
    programs = [compiled((("seed", seed), ("model.dropout", 0.5))) for seed in (0, 1)]
    arguments = make_state(), make_batch(), KEY, RATE
    first, second = (program.lower(*arguments).as_text() for program in programs)
    assert first == second


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_runs_of_every_length_and_rate_share_one_program(weights, monkeypatch):
    def text(**fields):
        config = make_config(**{"data.class_weights": weights, **fields})
        lowered = []  # nothing is compiled
        monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, _: lowered.append(self))
        step.compile_step(config, sharding.make_mesh(), state.abstract_state(config))
        return lowered[0].as_text()

    plain = text()
    assert plain == text(steps=7, epochs=3.5)
    assert plain == text(**{"data.train_size": 1000})
    for name, value in (("learning_rate", 0.7), ("warmup_epochs", 2.5), ("final_fraction", 0.5)):
        assert plain == text(**{f"optim.{name}": value}), name
    assert plain != text(label_smoothing=0.1)  # so that the test can fail


# ---- several steps in a call --------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_a_call_gathers_and_takes_the_steps_one_by_one(steps):
    config = make_config(**{"model.dropout": 0.5, "augment.flips": True})
    mesh, split = sharding.make_mesh(), make_batch(20)
    train_step = step.make_train_step(config)
    call, single = jax.jit(step.make_multi_step(train_step, mesh)), jax.jit(train_step)
    rows = np.random.default_rng(2).integers(0, 20, (steps, 8), dtype=np.int32)
    rates = np.float32([0.5, 0.1, 0.3])[:steps]
    after, metrics = call(make_state(), Selection(split, jnp.asarray(rows)), KEY, rates, None)
    expected, losses = make_state(), []
    for indices, rate in zip(rows, rates, strict=True):
        expected, figures = single(expected, take(split, indices), KEY, rate)
        losses.append(figures["loss"])
    assert {value.shape for value in metrics.values()} == {(steps,)}
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    np.testing.assert_array_equal(metrics["learning_rate"], rates)
    assert after.step == 5 + steps
    assert_close(after, expected, 1e-5)


# ---- accumulation -------------------------------------------------------------------------------


def test_accumulation_averages_the_gradients_of_its_micro_batches():
    batch = make_batch()
    whole, metrics = train(batch, **{"optim.accumulate": 2})
    parts = [train(take(batch, np.s_[first::2])) for first in (0, 1)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *[difference(after) for after, _ in parts])
    assert_close(difference(whole), mean, 1e-4)
    for name in ("loss", "accuracy"):
        expected = np.mean([float(part[name]) for _, part in parts])
        assert metrics[name] == pytest.approx(expected, rel=1e-4)
    assert whole.step == 6


def test_accumulation_updates_the_statistics_once_per_micro_batch():
    batch, keep = make_batch(), make_config().model.bn_momentum
    whole, _ = train(batch, **{"optim.accumulate": 2})
    first, second = (train(take(batch, np.s_[i::2]))[0].batch_stats for i in (0, 1))
    # keep * old + (1 - keep) * mine, twice: the second starts from what the first left.
    expected = jax.tree.map(
        lambda old, one, two: two + keep * (one - old), make_state().batch_stats, first, second
    )
    assert_close(whole.batch_stats, expected, 1e-4)


def test_accumulation_is_one_pass_with_as_many_groups():
    batch = make_batch()
    # Micro-batches interleave, groups are consecutive.
    interleaved = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
    whole, metrics = train(batch, **{"optim.accumulate": 2})
    grouped, expected = train(take(batch, interleaved), bn_groups=2)
    for name in ("loss", "accuracy", "grad_norm"):
        assert metrics[name] == pytest.approx(float(expected[name]), rel=1e-3)
    assert_close(difference(whole), difference(grouped), 1e-4)
    _, plain = train(batch)
    assert abs(plain["loss"] - metrics["loss"]) > 1e-3  # so that the test can fail
