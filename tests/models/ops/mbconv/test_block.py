"""Tests the block of kernels against the block of layers, which other tests compare with torch."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bef_jax.models.layers import SqueezeExcite, padding_of
from bef_jax.models.ops.depthwise import depthwise_conv
from bef_jax.models.ops.mbconv.block import KernelPlan, mbconv
from bef_jax.models.ops.mbconv.grid import Window
from bef_jax.models.ops.mbconv.grid import _strip as strip_of
from bef_jax.models.ops.norm import batch_norm
from tests.conftest import environment_of

EPSILON = 1e-3
SIDE = 5
CHANNELS = (8, 16, 24)


@pytest.fixture(autouse=True)
def as_on_tpu(monkeypatch):
    """Simulates a TPU's memory: unwritten values are NaN, and a read outside an array is an error.

    Two cores share the tiles of images in a random order, and no core waits for the other.
    """
    params = pltpu.InterpretParams(
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        num_cores_or_threads=2,
        random_seed=0,
        detect_races=True,
    )
    call = pl.pallas_call

    def simulated(*args, interpret, **kwargs):
        return call(*args, interpret=interpret and params, **kwargs)

    monkeypatch.setattr(pl, "pallas_call", simulated)


def make_params(channels, kernel, squeeze_excite=True):
    """Makes the parameters of a block's layers, all far from their values at the start."""
    rng = np.random.default_rng(kernel)
    inputs, hidden, outputs = channels

    def normal(*shape, scale=1.0, mean=0.0):
        return jnp.asarray(rng.normal(mean, scale, shape), jnp.float32)

    def norm():
        return {"scale": normal(hidden, scale=0.2, mean=1), "bias": normal(hidden, scale=0.3)}

    params = {
        "depthwise_conv": {"kernel": normal(kernel, kernel, 1, hidden, scale=1 / kernel)},
        "depthwise_norm": norm(),
        "project_conv": {"kernel": normal(1, 1, hidden, outputs, scale=hidden**-0.5)},
    }
    if inputs != hidden:
        params["expand_conv"] = {"kernel": normal(1, 1, inputs, hidden, scale=inputs**-0.5)}
        params["expand_norm"] = norm()
    if squeeze_excite:
        params["squeeze_excite"] = {
            "reduce": {"kernel": normal(hidden, 4, scale=hidden**-0.5), "bias": normal(4)},
            "expand": {"kernel": normal(4, hidden), "bias": normal(hidden)},
        }
    return params


def make_plan(kernel, stride, groups=1, convention="same", activation="silu", ends=()):
    """Makes a plan of one strip, or of several that end at the output rows `ends`."""
    padding = padding_of(kernel, stride, (SIDE, SIDE), convention)
    window = Window((SIDE, SIDE), kernel, stride, padding)
    rows = itertools.pairwise((0, *ends, window.outputs[0]))
    strips = (strip_of(window, *pair, *CHANNELS, 4) for pair in rows)
    strips = tuple(dataclasses.replace(strip, channels=8) for strip in strips)
    return KernelPlan(strips, groups, EPSILON, activation)


def window_of(plan):
    """Returns the window of the whole map."""
    first, last = plan.strips[0].window, plan.strips[-1].window
    rows = first.padding[0][0], last.padding[0][1]
    return dataclasses.replace(first, size=(SIDE, SIDE), padding=(rows, first.padding[1]))


def make_images(count, channels=CHANNELS[0], dtype=jnp.float32):
    """Makes images whose mean is not 0, so that norms have something to subtract."""
    x = np.random.default_rng(0).normal(0.5, 1, (count, SIDE, SIDE, channels))
    return jnp.asarray(x, dtype)


def by_layers(x, params, plan):
    """Computes `efficientnet.MBConv._by_layers` without its module."""
    options, statistics, window = (plan.groups, EPSILON, plan.activation), {}, window_of(plan)
    if "expand_conv" in params:
        x = x @ params["expand_conv"]["kernel"][0, 0].astype(x.dtype)
        x, *statistics["expand_norm"] = batch_norm(x, **params["expand_norm"], **named(options))
    kernel = params["depthwise_conv"]["kernel"].astype(x.dtype)
    x = depthwise_conv(x, kernel, window.stride, window.padding)
    x, *statistics["depthwise_norm"] = batch_norm(x, **params["depthwise_norm"], **named(options))
    if "squeeze_excite" in params:
        x = SqueezeExcite(4).apply({"params": params["squeeze_excite"]}, x)
    y = x @ params["project_conv"]["kernel"][0, 0].astype(x.dtype)
    return y, {name: tuple(values) for name, values in statistics.items()}


def named(options):
    return dict(zip(("groups", "epsilon", "activation"), options, strict=True))


def everything(function, x, params, plan):
    """Returns the output, the statistics, and the gradients of x and of the parameters."""

    def run(x, params, cotangent):
        y, pullback, statistics = jax.vjp(
            lambda *args: function(*args, plan), x, params, has_aux=True
        )
        return y, statistics, pullback(cotangent.astype(y.dtype))

    shape = jax.eval_shape(lambda *args: function(*args, plan)[0], x, params).shape
    cotangent = np.random.default_rng(1).normal(size=shape)
    return jax.jit(run)(x, params, jnp.asarray(cotangent, jnp.float32))


def errors(actual, expected):
    """Returns each array's greatest error, divided by its greatest value."""

    def error(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        return np.abs(a - b).max() / np.abs(b).max()

    return jax.tree.leaves(jax.tree.map(error, actual, expected))


IDS = (
    "3x3", "5x5, two groups", "stride 2, symmetric", "5x5, stride 2", "lite", "no expansion",
    "three strips", "stride 2, two strips", "no expansion, two strips",
)  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "images", "channels", "squeeze_excite"),
    [
        pytest.param(make_plan(3, 1), 128, CHANNELS, True, marks=pytest.mark.smoke),
        (make_plan(5, 1, groups=2), 256, CHANNELS, True),
        (make_plan(3, 2, convention="symmetric"), 256, CHANNELS, True),
        (make_plan(5, 2), 128, CHANNELS, True),
        (make_plan(3, 2, activation="relu6"), 128, CHANNELS, False),
        (make_plan(3, 1), 128, (16, 16, 8), True),
        (make_plan(3, 1, ends=(2, 3)), 128, CHANNELS, True),
        (make_plan(5, 2, ends=(1,), convention="symmetric"), 128, CHANNELS, True),
        (make_plan(3, 1, ends=(3,)), 128, (16, 16, 8), True),
    ],
    ids=IDS,
)
def test_all_is_as_by_layers(plan, images, channels, squeeze_excite):
    params = make_params(channels, plan.strips[0].window.kernel, squeeze_excite)
    x = make_images(images, channels[0])
    actual = everything(mbconv, x, params, plan)
    expected = everything(by_layers, x, params, plan)
    assert max(errors(actual, expected)) < 2e-5


@pytest.fixture
def optimised():
    """Switches XLA's optimisation on.

    Without it, the CPU compiler has no product of bfloat16 that gives float32.
    """
    disabled = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", disabled)


def test_bfloat16_is_no_further_from_float32_than_layers_are(optimised):
    plan, params = make_plan(3, 1), make_params(CHANNELS, 3)
    exact = everything(by_layers, make_images(128), params, plan)
    rounded = make_images(128, dtype=jnp.bfloat16)
    ours = errors(everything(mbconv, rounded, params, plan), exact)
    layers = errors(everything(by_layers, rounded, params, plan), exact)
    assert max(ours) < max(layers)
    assert np.mean(ours) < np.mean(layers)


SCRIPT = """
import json
import jax
from bef_jax.runtime import sharding
from bef_jax.planning import counts, hlo
from bef_jax.models.ops.mbconv.block import mbconv
from tests.models.ops.mbconv.test_block import *

plan, params, x = make_plan(3, 1, groups=8), make_params(CHANNELS, 3), make_images(8 * 128)
one = everything(mbconv, x, params, plan)
mesh = sharding.make_mesh()
with jax.set_mesh(mesh):
    x = jax.device_put(x, sharding.by_rows(mesh))
    eight = everything(mbconv, x, params, plan)
    program = jax.jit(lambda x: mbconv(x, params, plan)[0]).lower(x).compile().as_text()
print(json.dumps([mesh.size, max(errors(eight, one)), counts.collectives(hlo.read(program))]))
"""


@pytest.mark.slow
def test_eight_devices_compute_a_group_each():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment_of(8), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    devices, error, found = json.loads(result.stdout)
    assert devices == 8
    assert error < 1e-5
    assert found == {}  # no device needs data from another one
