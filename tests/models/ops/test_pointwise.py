"""Tests that the form for CPU and the form for accelerators give the same product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bef_jax.models.ops import pointwise


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(params=["cpu", "default"])
def platform(request, monkeypatch):
    """Takes the branch of this name, as lowering would for the platform."""

    def take(*operands, **branches):
        return branches[request.param](*operands)

    monkeypatch.setattr(lax, "platform_dependent", take)


@pytest.mark.usefixtures("platform")
def test_pointwise_multiplies_every_position():
    x, kernel = normal(3, 4, 5, 6), normal(6, 2, seed=1)
    expected = np.einsum("nhwk,kc->nhwc", x.astype(np.float64), kernel)
    np.testing.assert_allclose(pointwise.pointwise(x, kernel), expected, rtol=1e-5, atol=1e-5)
    assert pointwise.pointwise(x, None) is x


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(("narrow", "wide"), [(3, 8), (8, 3), (5, 5)])
def test_pointwise_has_the_gradients_of_a_product(narrow, wide):
    x, kernel = normal(2, 3, 4, narrow), normal(narrow, wide, seed=1)
    cotangent = normal(2, 3, 4, wide, seed=2)
    _, pullback = jax.vjp(pointwise.pointwise, x, kernel)
    dx, dkernel = pullback(cotangent)
    exact = cotangent.astype(np.float64)
    np.testing.assert_allclose(dx, exact @ kernel.T, rtol=1e-5, atol=1e-5)
    expected = np.einsum("nhwk,nhwc->kc", x, exact)
    np.testing.assert_allclose(dkernel, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("platform")
def test_grouped_pointwise_takes_each_group_s_kernel():
    x, kernel = normal(2, 3, 4, 5, 6), normal(2, 6, 7, seed=1)
    expected = np.stack([a.astype(np.float64) @ k for a, k in zip(x, kernel, strict=True)])
    actual = pointwise.grouped_pointwise(x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("platform")
def test_grouped_moments_sum_over_positions():
    x, y = normal(2, 3, 4, 5, 6), normal(2, 3, 4, 5, 7, seed=1)
    expected = [
        np.einsum("nhwk,nhwc->kc", a.astype(np.float64), b) for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(pointwise.grouped_moments(x, y), expected, rtol=1e-4, atol=1e-4)


def test_tpu_and_gpu_get_no_flattened_activations():
    """Lowers for each platform without running; on TPU, flattening a map would copy it."""
    x = jax.ShapeDtypeStruct((2, 4, 5, 6), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((6, 3), jnp.bfloat16)
    traced = jax.jit(pointwise.pointwise).trace(x, kernel)
    assert "reshape" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "reshape" not in traced.lower(lowering_platforms=("tpu",)).as_text()
