import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bef_jax.models import boosted
from bef_jax.models.boosted import CBAM, fused_stages, maximum, reduce_downsampling
from bef_jax.models.efficientnet import B0, SCALING, TEST, scaled


def strides_of(architecture):
    return [stage.stride for stage in architecture.stages]


def test_fused_stages_of_b3_end_in_blocks_4_7_17_and_25():
    b3 = scaled("b3")
    fused = fused_stages(strides_of(b3))
    ends = list(itertools.accumulate(stage.repeats for stage in b3.stages))
    assert fused == (2, 3, 5, 7)
    assert [ends[number - 1] - 1 for number in fused] == [4, 7, 17, 25]


@pytest.mark.parametrize(
    ("strides", "fused"),
    [
        ([1, 2, 2, 2, 2], (2, 3, 4, 5)),
        ([2, 1, 1, 2, 1], (3, 5)),
        ([1, 1, 2], (3,)),  # the stem's own resolution is left out
        ([1, 1], ()),
    ],
)
def test_fused_stages(strides, fused):
    assert fused_stages(strides) == fused


@pytest.mark.parametrize("architecture", [TEST, *map(scaled, SCALING)])
@pytest.mark.parametrize("total_stride", [32, 16, 8])
def test_total_stride(architecture, total_stride):
    stem, stages = reduce_downsampling(2, architecture.stages, total_stride)
    assert stem * math.prod(stage.stride for stage in stages) == total_stride
    for old, new in zip(architecture.stages, stages, strict=True):
        assert (new.channels, new.repeats, new.kernel) == (old.channels, old.repeats, old.kernel)


@pytest.mark.parametrize(
    ("total_stride", "stem", "strides"),
    [
        (32, 2, [1, 2, 2, 2, 1, 2, 1]),
        (16, 1, [1, 2, 2, 2, 1, 2, 1]),
        (8, 1, [1, 2, 2, 2, 1, 1, 1]),
    ],
)
def test_where_b0_loses_its_strides(total_stride, stem, strides):
    actual_stem, stages = reduce_downsampling(2, B0.stages, total_stride)
    assert (actual_stem, [stage.stride for stage in stages]) == (stem, strides)


@pytest.mark.parametrize(("axes", "shape"), [((1, 2), (2, 3)), ((3,), (2, 4, 5))])
def test_maximum_and_its_gradient(axes, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    cotangent = rng.normal(size=shape).astype(np.float32)
    result, pullback = jax.vjp(lambda x: maximum(x, axes), x)
    np.testing.assert_array_equal(result, x.max(axes))
    # Without ties the gradient goes to the one greatest position.
    expected = np.expand_dims(cotangent, axes) * (x == x.max(axes, keepdims=True))
    np.testing.assert_array_equal(pullback(cotangent)[0], expected)


def test_gradient_of_maximum_is_shared_by_ties():
    x = jnp.array([[1.0, 3.0, 3.0, 2.0]])
    (gradient,) = jax.vjp(lambda x: maximum(x, (1,)), x)[1](jnp.array([6.0]))
    assert gradient.tolist() == [[0, 3, 3, 0]]


def test_gradient_of_maximum_is_finite_where_rounding_left_no_position_that_attains_it():
    x = jnp.array([[1.0, 3.0]])
    residuals = x, jnp.nextafter(x.max(1, keepdims=True), jnp.inf)
    (gradient,) = boosted._maximum_backward((1,), residuals, jnp.array([6.0]))
    assert np.isfinite(gradient).all()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cbam_by_formula(x, params):
    """CBAM, equations 1 to 3, in float64; the spatial convolution position by position."""
    hidden, output = params["channel"]["Dense_0"], params["channel"]["Dense_1"]

    def mlp(features):
        features = np.maximum(features @ hidden["kernel"] + hidden["bias"], 0)
        return features @ output["kernel"] + output["bias"]

    x = x * sigmoid(mlp(x.mean((1, 2))) + mlp(x.max((1, 2))))[:, None, None]
    maps = np.stack([x.mean(-1), x.max(-1)], -1)
    kernel, bias = params["spatial"]["Conv_0"]["kernel"], params["spatial"]["Conv_0"]["bias"]
    k = kernel.shape[0]
    padded = np.pad(maps, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    gate = np.zeros((*x.shape[:3], 1))
    for row, column in np.ndindex(*x.shape[1:3]):
        window = padded[:, row : row + k, column : column + k]
        gate[:, row, column] = np.einsum("nijc,ijco->no", window, kernel) + bias
    return x * sigmoid(gate)


@pytest.mark.parametrize(("reduction", "kernel", "hidden"), [(4, 7, 2), (16, 3, 1)])
def test_cbam_is_the_formula(reduction, kernel, hidden):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4, 8))
    layer = CBAM(reduction, kernel)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x.astype(np.float32))["params"]
    assert shapes["channel"]["Dense_0"]["kernel"].shape == (8, hidden)  # at least 1
    assert shapes["spatial"]["Conv_0"]["kernel"].shape == (kernel, kernel, 2, 1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    actual = layer.apply({"params": jax.tree.map(np.float32, params)}, x.astype(np.float32))
    np.testing.assert_allclose(actual, cbam_by_formula(x, params), rtol=1e-4, atol=1e-5)


def test_cbam_keeps_bfloat16():
    x = jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.bfloat16)
    output, variables = jax.eval_shape(CBAM().init_with_output, jax.random.key(0), x)
    assert output.dtype == x.dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
