"""Tests a normalised 1 x 1 convolution against convolution and norm one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bef_jax.models.layers import BatchNorm
from bef_jax.models.ops.depthwise import depthwise_conv
from bef_jax.models.ops.norm import batch_norm, pointwise_batch_norm

EPSILON = 1e-3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_arrays(n=6, side=5, inputs=4, outputs=12):
    """Makes an x far from 0, so that a variance by E[x^2] - E[x]^2 would lose digits."""
    return (
        normal(n, side, side, inputs) * 2 + 5,
        normal(inputs, outputs, seed=1),
        normal(outputs, seed=2) + 1,
        normal(outputs, seed=3),
    )


def plain(x, kernel, scale, bias):
    product = x @ kernel
    axes = tuple(range(x.ndim - 1))
    mean = product.mean(axes)
    var = jnp.square(product - mean).mean(axes)
    y = (product - mean) / jnp.sqrt(var + EPSILON) * scale + bias
    return y / (1 + jnp.exp(-y)), mean, var


@pytest.mark.parametrize("groups", [1, 3])
def test_output_and_statistics_are_those_of_the_product(groups):
    x, *rest = make_arrays()
    actual = pointwise_batch_norm(x, *rest, groups, EPSILON, "silu")
    parts = [plain(part, *rest) for part in np.split(x, groups)]
    expected = [jnp.concatenate([y for y, _, _ in parts])]
    expected += [jnp.stack(statistic) for statistic in list(zip(*parts, strict=True))[1:]]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_is_that_of_the_definition(groups):
    arrays = make_arrays()
    cotangent = normal(6, 5, 5, 12, seed=4)

    def ours(*arrays):
        return pointwise_batch_norm(*arrays, groups, EPSILON, "silu")[0]

    def definition(x, *rest):
        return jnp.concatenate([plain(part, *rest)[0] for part in jnp.split(x, groups)])

    def gradients(function):
        return jax.jit(lambda: jax.vjp(function, *arrays)[1](cotangent))()

    for a, e in zip(gradients(ours), gradients(definition), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-3, atol=1e-3 * np.abs(e).max())


def test_a_scale_of_zero_has_finite_gradients():
    x, kernel, scale, bias = make_arrays()
    scale = np.zeros_like(scale)
    grads = jax.grad(lambda *a: pointwise_batch_norm(*a, 1, EPSILON, "silu")[0].sum(), (0, 1, 2, 3))
    for gradient in grads(x, kernel, scale, bias):
        assert np.isfinite(gradient).all()


# With few positions the statistics come from the product, with many from its input.
@pytest.mark.parametrize("side", [1, 6])
def test_module_takes_the_kernel_of_the_convolution_before_it(side):
    x, kernel, *_ = make_arrays(n=4, side=side)
    norm = BatchNorm(activation="silu", epsilon=EPSILON)
    variables = norm.init(jax.random.key(0), x @ kernel, True)
    expected, stats = norm.apply(variables, x @ kernel, True, mutable=["batch_stats"])
    actual, updates = norm.apply(variables, x, True, kernel, mutable=["batch_stats"])
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3), updates, stats)
    evaluated = norm.apply(variables | stats, x, False, kernel)
    np.testing.assert_allclose(
        evaluated, norm.apply(variables | stats, x @ kernel, False), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_is_near_float32():
    arrays = make_arrays()
    exact = pointwise_batch_norm(*arrays, 1, EPSILON, "silu")[0]
    rough = pointwise_batch_norm(
        *(jnp.bfloat16(a) for a in arrays[:2]), *arrays[2:], 1, EPSILON, "silu"
    )
    assert rough[0].dtype == jnp.bfloat16
    assert rough[1].dtype == rough[2].dtype == jnp.float32
    np.testing.assert_allclose(np.float32(rough[0]), exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="CPU's form of the convolution")
def test_a_depthwise_convolution_is_computed_once_for_all_that_read_it():
    """Counts products, because XLA may compute the 25 taps again for each of the three readers."""

    def layer(x, kernel, scale, bias):
        y = depthwise_conv(x, kernel, 1, ((2, 2), (2, 2)))
        return batch_norm(y, scale, bias, 1, 1e-3, "silu")

    arguments = (np.ones(s, np.float32) for s in [(8, 12, 12, 32), (5, 5, 1, 32), (32,), (32,)])
    program = jax.jit(layer).lower(*arguments).compile().as_text()
    assert 25 <= program.count(" multiply(") < 2 * 25
