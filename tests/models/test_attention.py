import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from bef_jax.models.attention import CBAM, smooth_maximum


@pytest.mark.parametrize("axes", [(1, 2), (3,)])
def test_smooth_maximum_is_log_mean_exp_and_its_gradient_a_softmax(axes):
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3))
    result, pullback = jax.vjp(lambda x: smooth_maximum(x, axes), x.astype(np.float32))
    np.testing.assert_allclose(result, log_mean_exp(x, axes), rtol=1e-5, atol=1e-6)
    expected = scipy.special.softmax(2 * x, axes)
    np.testing.assert_allclose(pullback(jnp.ones_like(result))[0], expected, rtol=1e-5)


def test_smooth_maximum_lies_between_mean_and_maximum_and_nears_it_as_values_grow():
    x = jnp.array([[0.0, 1.0, 2.0], [0.0, 100.0, 200.0]])
    small, large = smooth_maximum(x, (1,))
    assert 1 < small < 2
    np.testing.assert_allclose(large, 200 - math.log(3) / 2, rtol=1e-6)  # exp(400) would be inf


def log_mean_exp(x, axes):
    return np.log(np.exp(2 * x).mean(axes)) / 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cbam_by_formula(x, params):
    """Computes CBAM, equations 1 to 3, in float64, with a smooth maximum, SiLU and loops."""
    hidden, output = params["channel"]["Dense_0"], params["channel"]["Dense_1"]

    def mlp(features):
        features = features @ hidden["kernel"] + hidden["bias"]
        return features * sigmoid(features) @ output["kernel"] + output["bias"]

    x = x * sigmoid(mlp(x.mean((1, 2))) + mlp(log_mean_exp(x, (1, 2))))[:, None, None]
    maps = np.stack([x.mean(-1), log_mean_exp(x, (3,))], -1)
    kernel, bias = params["spatial"]["Conv_0"]["kernel"], params["spatial"]["Conv_0"]["bias"]
    k = kernel.shape[0]
    padded = np.pad(maps, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    gate = np.zeros((*x.shape[:3], 1))
    for row, column in np.ndindex(*x.shape[1:3]):
        window = padded[:, row : row + k, column : column + k]
        gate[:, row, column] = np.einsum("nijc,ijco->no", window, kernel) + bias
    return x * sigmoid(gate)


@pytest.mark.parametrize(("reduction", "kernel", "hidden"), [(1, 7, 16), (4, 3, 8)])
def test_cbam_is_the_formula(reduction, kernel, hidden):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4, 16))
    layer = CBAM(reduction, kernel)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x.astype(np.float32))["params"]
    assert shapes["channel"]["Dense_0"]["kernel"].shape == (16, hidden)  # at least 8
    assert shapes["spatial"]["Conv_0"]["kernel"].shape == (kernel, kernel, 2, 1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    actual = layer.apply({"params": jax.tree.map(np.float32, params)}, x.astype(np.float32))
    np.testing.assert_allclose(actual, cbam_by_formula(x, params), rtol=1e-4, atol=1e-5)


def test_cbam_keeps_bfloat16():
    x = jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.bfloat16)
    output, variables = jax.eval_shape(CBAM().init_with_output, jax.random.key(0), x)
    assert output.dtype == x.dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
