"""Tests the passes for GPUs, run on a CPU, against the definition and JAX's own gradient of it."""

import importlib.util
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from bef_jax.models.layers import global_pool
from bef_jax.models.ops import gpu_norm
from bef_jax.models.ops.norm import batch_norm
from bef_jax.runtime import sharding
from bef_jax.runtime.devices import CUDA_PLUGINS
from tests.conftest import environment_of

EPSILON = 1e-3
ACTIVATIONS = {"silu": jax.nn.silu, "none": lambda x: x, "relu6": jax.nn.relu6}
# (images, side, channels). The rows are few, many enough for several parts, and an odd number.
SHAPES = [(4, 4, 16), (16, 34, 8), (3, 5, 6)]


@pytest.fixture(autouse=True)
def for_gpu(monkeypatch):
    monkeypatch.setattr(sharding, "for_gpu", lambda: True)
    jax.clear_caches()  # what was traced before is not for GPUs
    yield
    jax.clear_caches()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def defined_norm(x, scale, bias, groups, activation):
    """Returns y, means and variances, group by group, from the definition."""
    parts = jnp.split(x, groups)
    means = [part.mean((0, 1, 2)) for part in parts]
    variances = [jnp.square(p - m).mean((0, 1, 2)) for p, m in zip(parts, means, strict=True)]
    normalised = [
        (part - mean) / jnp.sqrt(var + EPSILON) * scale + bias
        for part, mean, var in zip(parts, means, variances, strict=True)
    ]
    y = ACTIVATIONS[activation](jnp.concatenate(normalised))
    return y, jnp.stack(means), jnp.stack(variances)


def gradients(function, arrays, cotangent):
    pull = jax.jit(lambda cotangent, *arrays: jax.vjp(function, *arrays)[1](cotangent))
    return pull(cotangent, *arrays)


def assert_close(actual, expected, tolerance):
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, e in leaves:
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1e-3, np.abs(e).max()))


# ---- batch normalisation ------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n", "side", "channels"), SHAPES)
def test_batch_norm_and_its_gradients(n, side, channels, activation, groups):
    n = n // groups * groups
    x = normal(n, side, side, channels) * 2 + 1
    scale, bias = normal(channels, seed=1) + 1, normal(channels, seed=2)
    cotangent = normal(*x.shape, seed=3)

    def ours(*arrays):
        return batch_norm(*arrays, groups, EPSILON, activation)

    def definition(*arrays):
        return defined_norm(*arrays, groups, activation)

    arrays = (x, scale, bias)
    assert_close(jax.jit(ours)(*arrays), definition(*arrays), 1e-5)
    actual = gradients(lambda *a: ours(*a)[0], arrays, cotangent)
    expected = gradients(lambda *a: definition(*a)[0], arrays, cotangent)
    assert_close(actual, expected, 1e-5)


def test_a_constant_channel_has_finite_gradients():
    x, ones = jnp.full((16, 34, 34, 8), 1500.9), jnp.ones(8)
    mean, square = gpu_norm._moments(gpu_norm._maps(x, 1))
    assert (square - mean * mean < -EPSILON).all()  # by rounding; its root would be NaN
    loss = jax.grad(lambda *a: batch_norm(*a, 1, EPSILON, "silu")[0].sum(), (0, 1, 2))
    for gradient in loss(x, ones, ones):
        assert np.isfinite(gradient).all()


# ---- with squeeze-excite and the projection -----------------------------------------------------


def make_excite(channels, hidden):
    return {
        "reduce": {"kernel": normal(channels, hidden, seed=4), "bias": normal(hidden, seed=5)},
        "expand": {"kernel": normal(hidden, channels, seed=6), "bias": normal(channels, seed=7)},
    }


def make_arrays(n, side, channels, outputs):
    norm = {"scale": normal(channels, seed=1) + 1, "bias": normal(channels, seed=2)}
    kernel = normal(channels, outputs, seed=8)
    return normal(n, side, side, channels) * 2 + 1, norm, make_excite(channels, 5), kernel


def defined_excite(x, norm, excite, kernel, groups):
    a, *statistics = defined_norm(x, norm["scale"], norm["bias"], groups, "silu")
    hidden = jax.nn.silu(a.mean((1, 2)) @ excite["reduce"]["kernel"] + excite["reduce"]["bias"])
    gate = jax.nn.sigmoid(hidden @ excite["expand"]["kernel"] + excite["expand"]["bias"])
    return (a * gate[:, None, None]) @ kernel, *statistics


# 16 positions are enough for a kernel of each image with 4 outputs, but not with 6.
@pytest.mark.parametrize(("side", "outputs", "by_kernel"), [(4, 4, True), (4, 6, False)])
@pytest.mark.parametrize("groups", [1, 3])
def test_excited_projection_and_its_gradients(side, outputs, by_kernel, groups):
    arrays = make_arrays(6, side, 16, outputs)
    maps = gpu_norm._maps(arrays[0], groups)
    assert gpu_norm._gates_kernel(maps, arrays[-1]) == by_kernel
    cotangent = normal(6, side, side, outputs, seed=9)

    def ours(*arrays):
        return gpu_norm.norm_excite_project(*arrays, groups, EPSILON, "silu")

    def definition(*arrays):
        return defined_excite(*arrays, groups)

    assert_close(jax.jit(ours)(*arrays), definition(*arrays), 1e-5)
    actual = gradients(lambda *a: ours(*a)[0], arrays, cotangent)
    expected = gradients(lambda *a: definition(*a)[0], arrays, cotangent)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("outputs", [4, 6])
def test_bfloat16_is_as_near_to_float32_as_the_layers(outputs):
    """Compares errors with those of the same operations, each rounded to bfloat16."""
    x, norm, excite, kernel = make_arrays(32, 4, 16, outputs)
    cotangent = normal(32, 4, 4, outputs, seed=9)

    def ours(x, *rest):
        return gpu_norm.norm_excite_project(x, *rest, 1, EPSILON, "silu")[0]

    def layers(x, norm, excite, kernel):
        y = defined_norm(jnp.float32(x), norm["scale"], norm["bias"], 1, "silu")[0]
        y = y.astype(x.dtype)
        gate = gpu_norm.excite(excite, global_pool(y)[None])[0].astype(x.dtype)
        return (y * gate[:, None, None]) @ kernel.astype(x.dtype)

    def both(function, dtype):
        arrays = jnp.asarray(x, dtype), norm, excite, kernel
        y = function(*arrays)
        assert y.dtype == dtype
        return [y, *gradients(function, arrays, jnp.asarray(cotangent, dtype))]

    def errors(function):
        pairs = zip(
            jax.tree.leaves(both(function, jnp.bfloat16)),
            jax.tree.leaves(both(layers, jnp.float32)),
            strict=True,
        )
        return [np.linalg.norm(np.float32(a) - e) / np.linalg.norm(e) for a, e in pairs]

    ours, theirs = errors(ours), errors(layers)
    assert max(theirs) < 0.05
    # A single one may be larger by chance, because both are rounding errors.
    assert np.mean(ours) < 1.1 * np.mean(theirs)
    assert max(ours) < 1.5 * max(theirs)


# ---- how the sums are divided -------------------------------------------------------------------


# (images, positions, channels, parts): enough sums for a GPU, from parts of 32 to 1,024 rows.
@pytest.mark.parametrize(
    ("n", "positions", "channels", "parts"),
    [
        (256, 36, 576, 128),
        (256, 9, 1392, 64),
        (256, 9, 672, 64),
        (256, 2304, 24, 4096),
        (3, 7, 8, 1),
    ],
)
def test_parts_keep_all_cores_busy(n, positions, channels, parts):
    assert gpu_norm._parts(jax.ShapeDtypeStruct((1, n, positions, channels), jnp.float32)) == parts


@pytest.mark.parametrize(("devices", "groups"), [(6, 1), (6, 4), (64, 1), (64, 64)])
def test_parts_are_shared_equally_by_the_devices_of_a_group(devices, groups):
    maps = jax.ShapeDtypeStruct((groups, 2 * devices, 9, 16), jnp.float32)
    mesh = AbstractMesh((devices,), ("data",))
    with jax.sharding.use_abstract_mesh(mesh):
        mean, _ = jax.eval_shape(gpu_norm._moments, maps)
        numbers = gpu_norm._divisors(maps)
    assert mean.shape == (groups, 16)
    shards = next(n for n in range(1, devices + 1) if groups * n % devices == 0)
    assert numbers[0] == shards
    assert all(n % shards == 0 for n in numbers)


@pytest.mark.parametrize("rows", [1, 15, 16, 1 << 10, 3 << 12, 1 << 15])
def test_sums_are_those_of_all_rows_for_any_number_of_rows(rows):
    a, b = normal(2, rows, 1, 5), normal(2, rows, 1, 5, seed=1)
    mean, square = gpu_norm._moments(a)
    np.testing.assert_allclose(mean, a.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(square, (a * a).mean((1, 2)), rtol=1e-4)
    dbias, dscale = gpu_norm._sums_of_gradient(a, b)
    np.testing.assert_allclose(dbias, a.sum((1, 2)), atol=2e-6 * rows)
    np.testing.assert_allclose(dscale, (a * b).sum((1, 2)), atol=2e-6 * rows)


# ---- on several devices -------------------------------------------------------------------------

ON_DEVICES = """
import json, sys
import jax, jax.numpy as jnp
from bef_jax.models.ops import gpu_norm
from bef_jax.models.ops.norm import batch_norm
from bef_jax.planning import counts, hlo
from bef_jax.runtime import sharding

groups = int(sys.argv[1])
sharding.for_gpu = lambda: True
mesh = sharding.make_mesh()
rows, everywhere = sharding.by_rows(mesh), sharding.replicated(mesh)

def loss(x, params, excite, kernel):
    x = batch_norm(x, params["scale"], params["bias"], groups, 1e-3, "silu")[0]
    return gpu_norm.norm_excite_project(x, params, excite, kernel, groups, 1e-3, "silu")[0].sum()

def array(*shape, where=everywhere):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

norm = {"scale": array(32), "bias": array(32)}
excite = {"reduce": {"kernel": array(32, 4), "bias": array(4)},
          "expand": {"kernel": array(4, 32), "bias": array(32)}}
found = []
for outputs in (4, 40):  # the gate multiplies the kernel, and the map
    arguments = array(48, 6, 6, 32, where=rows), norm, excite, array(32, outputs)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1, 2, 3)), out_shardings=(rows, *(everywhere,) * 3))
        text = step.lower(*arguments).compile().as_text()
    for operation, *_ in hlo.read(text).walk(fused=True):
        if operation.collective:
            found += [array.size for array in operation.arrays]
print(json.dumps(found))
"""


@pytest.mark.parametrize(("devices", "groups"), [(8, 1), (8, 8), (6, 1)])
def test_no_map_leaves_its_device(devices, groups):
    command = [sys.executable, "-c", ON_DEVICES, str(groups)]
    environment = environment_of(devices)
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    sizes = json.loads(run.stdout.splitlines()[-1])
    assert sizes  # the sums of gradients, at least
    # A device has 6 images or more, of 36 positions; sums have no positions, and few parts.
    assert max(sizes) < 6 * 36 * 32 * 4


# ---- compiled for a GPU -------------------------------------------------------------------------

COMPILE = """
import json
from bef_jax.configs import default
from bef_jax.planning import compiled_step, counts, hlo, topology
from bef_jax.training.packing import make_packing
from bef_jax.training.state import abstract_state
from bef_jax.training.step import compile_step

mesh = topology.make_mesh(topology.parse("h100:1"))
config = default.get_config("model.name=efficientnet_b0,batch_size=256,dtype=bfloat16")
state = make_packing(config, mesh).shapes(abstract_state(config))
options = compiled_step._COMPILER_OPTIONS["cuda"]
step = compile_step(config, mesh, state, options=options)
program = hlo.read(step.as_text())
kernels = [o for o, *_ in program.walk(fused=False) if o.kind in ("fusion", "custom-call", "copy")]
written = [array for kernel in kernels for array in kernel.arrays if array.dtype == "f32"]
print(json.dumps({
    "kernels": counts.kernels(program), "bytes": counts.hbm_traffic(program),
    "written": [[int(side) for side in array.dims.split(",") if side] for array in written],
}))
"""


@pytest.mark.compilers
def test_a_gpu_writes_no_float32_map_and_few_kernels():
    if not any(map(importlib.util.find_spec, CUDA_PLUGINS)):
        pytest.skip("no plug-in for CUDA is installed: it compiles for a GPU that is not here")
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # The smallest wide map has 256 images of 3 x 3 positions and 672 channels. The augmented images
    # have three channels, the vectors of the state one axis, and a kernel of each image three axes.
    maps = [d for d in found["written"] if len(d) > 1 and d[-1] != 3 and (d[0], len(d)) != (256, 3)]
    assert max(map(math.prod, maps)) < 256 * 3 * 3 * 672
    # Before these passes it had 1,530 kernels and 43.6 MB an image, and 865 and 36.5 with them.
    assert found["kernels"] < 1000
    assert found["bytes"] / 256 < 40e6
