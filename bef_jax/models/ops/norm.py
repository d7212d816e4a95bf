"""Batch normalisation (Ioffe & Szegedy 2015), with gradients that need few passes over memory.

A training step spends more time on moving bytes than on arithmetic, on CPU and on accelerators.
Batch normalisation moves most of these bytes. So the backward pass computes cheap values again
instead of reading them. If an expansion (a 1 x 1 convolution to more channels) has many positions
per input channel, the statistics come from its input. For GPUs, `gpu_norm` divides the same
arithmetic into other passes.

Symbols: x is the input, mean and var are its statistics per channel over n positions, and

    inverse_std = 1 / sqrt(var + epsilon)
    normalised = (x - mean) * inverse_std
    z = normalised * scale + bias
    y = activation(z)
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from bef_jax.models.ops import gpu_norm
from bef_jax.models.ops.activations import ACTIVATIONS, DERIVATIVES
from bef_jax.models.ops.pointwise import grouped_moments, grouped_pointwise
from bef_jax.runtime import sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm(
    x: Array, scale: Array, bias: Array, groups: int, epsilon: float, activation: str = "none"
):
    """Normalises each of `groups` parts of the batch by its own statistics, then activates.

    The statistics come from one pass over x, with the variance as E[x^2] - E[x]^2. The gradient is
    the closed form. The backward pass recomputes z and normalised from x; on every platform this is
    cheaper than storing them.

    Args:
        x: [N, ..., C]; N a multiple of `groups`.
        scale, bias: [C], float32.

    Returns:
        y, with the shape and dtype of x; mean and (biased) variance [groups, C], float32, through
        which no gradient flows.
    """
    return _batch_norm_forward(x, scale, bias, groups, epsilon, activation)[0]


def _batch_norm_forward(x, scale, bias, groups: int, epsilon: float, activation: str):
    if sharding.for_gpu():
        return gpu_norm.forward(x, scale, bias, groups, epsilon, activation)
    parts, axes = _parts(x.astype(jnp.float32), groups)  # XLA fuses the cast into what reads x
    # mean, square and var are [groups, 1, ..., 1, C], or [1, ..., 1, C] for one group. Both sums
    # take one pass together; sums of x - mean would need a second one. The difference below loses
    # about mean^2 / 2^24, which is little if means are about as large as standard deviations.
    mean = jnp.mean(parts, axes, keepdims=True)
    square = jnp.mean(parts * parts, axes, keepdims=True)
    # Rounding can make the difference of a constant channel negative, and its root NaN.
    var = jnp.maximum(square - mean * mean, 0.0)
    multiplier = scale * lax.rsqrt(var + epsilon)
    z = parts * multiplier + (bias - mean * multiplier)
    y = ACTIVATIONS[activation](z)
    statistics = mean.reshape(groups, -1), var.reshape(groups, -1)
    # x is the only large array that is kept. `normalised` and z are computed from it again.
    return (y.reshape(x.shape).astype(x.dtype), *statistics), (x, scale, bias, mean, var)


def _batch_norm_backward(groups: int, epsilon: float, activation: str, residuals, cotangents):
    """Returns dx, dscale and dbias, given g, the gradient of y.

    dz = g * activation'(z)
    dbias = sum(dz)
    dscale = sum(dz * normalised) = (sum(dz * x) - mean * dbias) * inverse_std
    dx = scale * inverse_std * (dz - (dbias + normalised * dscale) / n)

    The last line is from Ioffe & Szegedy 2015, section 3, with the gradients of mean and variance
    inserted. n is the number of positions of a group, and all sums are over these. The returned
    dscale and dbias are sums over the groups.
    """
    g, _, _ = cotangents  # mean and var only feed the running statistics, not the loss
    if sharding.for_gpu():
        return gpu_norm.backward(groups, activation, residuals, g)
    x, scale, bias, mean, var = residuals
    # This keeps XLA from reusing values of the forward pass, which it would have to keep in memory.
    x = lax.optimization_barrier(x)
    parts, axes = _parts(x.astype(jnp.float32), groups)
    g = g.reshape(parts.shape).astype(jnp.float32)
    inverse_std = lax.rsqrt(var + epsilon)
    z = (parts - mean) * (inverse_std * scale) + bias
    dz = g * DERIVATIVES[activation](z)
    # Both have the shape of mean and var. XLA takes both sums in one pass over x and dz.
    dbias = jnp.sum(dz, axes, keepdims=True)
    dscale = (jnp.sum(dz * parts, axes, keepdims=True) - mean * dbias) * inverse_std
    n = parts.size // (groups * x.shape[-1])
    normalised = (parts - mean) * inverse_std
    dx = scale * inverse_std * (dz - (dbias + normalised * dscale) / n)
    # The groups share scale and bias, so their gradients are sums over the groups, [C].
    total = functools.partial(jnp.sum, axis=tuple(range(parts.ndim - 1)))
    return dx.reshape(x.shape).astype(x.dtype), total(dscale), total(dbias)


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def pointwise_batch_norm(
    x: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    groups: int,
    epsilon: float,
    activation: str = "none",
):
    """Returns activation(batch_norm(x @ kernel)) without a pass over x @ kernel for its statistics.

    The product is linear, so its mean is mean(x) @ kernel, and its variance is the diagonal of
    kernel^T cov(x) kernel. Both are known before the product, so scale / std goes into the kernel,
    and the mean and the bias go into a shift [C] of the product. The gradient is similar: batch
    normalisation adds a linear map of x to dx. The cost is two more products over all positions:
    centered^T @ centered forwards, and centered @ correction backwards. This saves five passes over
    [N, H, W, C], where C = 6 * K in EfficientNet.

    Args:
        x: [N, H, W, K]; N a multiple of `groups`.
        kernel: [K, C], of x's dtype.
        scale, bias: [C], float32.

    Returns:
        y [N, H, W, C] of x's dtype; mean and (biased) variance [groups, C] of x @ kernel, float32,
        through which no gradient flows.
    """
    return _pointwise_forward(x, kernel, scale, bias, groups, epsilon, activation)[0]


def _pointwise_forward(x, kernel, scale, bias, groups: int, epsilon: float, activation: str):
    parts = x.reshape(groups, -1, *x.shape[1:])
    # x is centered first, unlike in `batch_norm`. kernel^T cov(x) kernel sums K^2 terms that nearly
    # cancel. The rounding errors of E[x_k x_l] - E[x_k] E[x_l] would not cancel, and could be
    # larger than the sum. x is narrow, so its copy is cheap.
    center, centered = _centered(parts)
    covariance = grouped_moments(centered, centered) / _positions(parts)
    # mean and var are [groups, C]. cov_kernel [groups, K, C] is kept for the gradient.
    mean = _exact("gk,kc->gc", center, kernel)
    cov_kernel = _exact("gkl,lc->gkc", covariance, kernel)
    var = jnp.maximum(jnp.sum(kernel * cov_kernel, 1), 0.0)
    multiplier = scale * lax.rsqrt(var + epsilon)
    # [groups, K, C]: a kernel for each group, because each has its own standard deviations.
    weights = (kernel * multiplier[:, None]).astype(x.dtype)
    scaled_product = grouped_pointwise(parts, weights)
    # scaled_product is made with the rounded weights, so its mean in the shift uses them, too.
    shift = _per_group(bias - _exact("gk,gkc->gc", center, weights))
    z = scaled_product + shift
    y = ACTIVATIONS[activation](z).astype(x.dtype).reshape(*x.shape[:-1], -1)
    # scaled_product is the only map of C channels that is kept, because z is computed again.
    return (y, mean, var), (x, kernel, scale, scaled_product, shift, cov_kernel, var)


def _pointwise_backward(groups: int, epsilon: float, activation: str, residuals, cotangents):
    """Returns dx, dkernel, dscale and dbias, given g, the gradient of y.

    With centered = x - mean(x) and normalised = inverse_std * (centered @ kernel),

    dz = g * activation'(z)
    dbias = sum(dz)
    moments = centered^T @ dz
    dscale = sum(dz * normalised) = inverse_std * sum_k(kernel * moments)
    dkernel = scale * inverse_std * (moments - (cov(x) @ kernel) * inverse_std * dscale)

    for each group. dkernel has no term of dbias, because centered sums to 0. dx is the gradient of
    x @ kernel, as in `_batch_norm_backward`, times kernel^T:

    dx = scale * inverse_std * (dz - (dbias + normalised * dscale) / n) @ kernel^T
       = dz @ scaled^T - centered @ correction - constant, with
    scaled = kernel * scale * inverse_std
    correction = (scaled * inverse_std * dscale) @ kernel^T / n, which is [K, K] and symmetric, and
    constant = scaled @ dbias / n, which is [K].

    So everything that the statistics add to dx has the width of x, not of the product. The returned
    dkernel, dscale and dbias are sums over the groups.
    """
    x, kernel, scale, scaled_product, shift, cov_kernel, var = residuals
    g, _, _ = cotangents  # mean and var only feed the running statistics, not the loss
    parts = x.reshape(groups, -1, *x.shape[1:])
    scaled_product = lax.optimization_barrier(scaled_product)  # as in _batch_norm_backward
    dz = g.reshape(scaled_product.shape) * DERIVATIVES[activation](scaled_product + shift)
    dz = dz.astype(x.dtype)  # rounded before the products, like the factors of the forward pass
    _, centered = _centered(parts)
    dbias = jnp.sum(dz, (1, 2, 3), dtype=jnp.float32)  # [groups, C]
    moments = grouped_moments(centered, dz)  # [groups, K, C]
    inverse_std = lax.rsqrt(var + epsilon)
    dscale = inverse_std * jnp.sum(kernel * moments, 1)
    # [groups, 1, C] each.
    factor, dscale_over_std = (scale * inverse_std)[:, None], (inverse_std * dscale)[:, None]
    dkernel = jnp.sum(factor * (moments - cov_kernel * dscale_over_std), 0)
    scaled = kernel * factor
    # "glk" makes the transpose. It is the same matrix, because it is symmetric. Do not change it to
    # "gkl": another rounding would change dx by 1e-7, and so every result that was recorded.
    correction = _product("gkc,lc->glk", scaled * dscale_over_std, kernel) / _positions(parts)
    constant = _product("gc,gkc->gk", dbias, scaled) / _positions(parts)
    # [groups, N / groups, H, W, K].
    dx = grouped_pointwise(dz, scaled.astype(x.dtype).swapaxes(1, 2))
    dx = dx - grouped_pointwise(centered, correction.astype(x.dtype)) - _per_group(constant)
    dx = dx.reshape(x.shape).astype(x.dtype)
    return dx, dkernel.astype(kernel.dtype), dscale.sum(0), dbias.sum(0)


pointwise_batch_norm.defvjp(_pointwise_forward, _pointwise_backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
# This is for small products whose errors would spread to everything that follows.
_exact = functools.partial(_product, precision=lax.Precision.HIGHEST)


def _parts(x: Array, groups: int) -> tuple[Array, tuple[int, ...]]:
    """Returns [groups, N / groups, ..., C], and the axes that statistics are taken over.

    With one group, it returns x itself. A reshape would be free, but after it XLA's CPU compiler
    would compute x (say, a depthwise convolution) once per reader.
    """
    if groups > 1:
        x = x.reshape(groups, -1, *x.shape[1:])
    return x, tuple(range(int(groups > 1), x.ndim - 1))


def _positions(parts: Array) -> int:
    return parts[0, ..., 0].size


def _per_group(x: Array) -> Array:
    return x[:, None, None, None]


def _centered(parts: Array) -> tuple[Array, Array]:
    """Returns the mean of each part, [groups, K] in float32, and the parts minus that mean."""
    center = jnp.mean(parts, (1, 2, 3), dtype=jnp.float32)
    # The result keeps the dtype of `parts`, so in bfloat16 the products read half the bytes.
    return center, (parts - _per_group(center)).astype(parts.dtype)
