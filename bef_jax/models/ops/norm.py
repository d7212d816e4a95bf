"""Batch normalisation (Ioffe & Szegedy 2015), with gradients that pass over memory least.

A training step moves more bytes than it multiplies numbers, on CPU as on accelerators, and most of
them on behalf of batch normalisation. So what can be computed again is not kept, and where a 1 x 1
convolution widens many positions, the statistics come from its narrow input.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from bef_jax.models.ops.pointwise import grouped_moments, grouped_pointwise

# By name, since a custom gradient's static arguments must be hashable, and stay the same object
# from one trace to the next: a lambda made in a layer would compile anew.
ACTIVATIONS = {"none": lambda x: x, "silu": nn.silu, "relu": nn.relu, "relu6": nn.relu6}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm(
    x: Array, scale: Array, bias: Array, groups: int, epsilon: float, activation: str = "none"
):
    """Normalises each of `groups` parts of the batch by its own statistics, then activates.

    The statistics come from one pass over x (E[x^2] - E[x]^2). The gradient is the closed form, and
    computes from x again what it needs: on every platform that is cheaper than memory.

    Args:
        x: [N, ..., C]; N a multiple of `groups`.
        scale, bias: [C], float32.

    Returns:
        y like x; mean and (biased) variance [groups, C], float32, through which no gradient flows.
    """
    return _batch_norm_forward(x, scale, bias, groups, epsilon, activation)[0]


def _batch_norm_forward(x, scale, bias, groups: int, epsilon: float, activation: str):
    parts, axes = _parts(x.astype(jnp.float32), groups)  # XLA fuses the cast into what reads x
    # [groups, 1, 1, 1, C] or [1, 1, 1, C], as `square` and `var`. Both sums in one pass; the mean
    # first and then the deviations would be two. The difference loses some mean^2 / 2^24: little,
    # where means are of the size of deviations.
    mean = jnp.mean(parts, axes, keepdims=True)
    square = jnp.mean(parts * parts, axes, keepdims=True)
    # Rounding can leave a constant channel's difference below 0, and a negative root is NaN.
    var = jnp.maximum(square - mean * mean, 0.0)
    multiplier = scale * lax.rsqrt(var + epsilon)
    y = parts * multiplier + (bias - mean * multiplier)
    y = ACTIVATIONS[activation](y)
    statistics = mean.reshape(groups, -1), var.reshape(groups, -1)
    # Of the large arrays x alone is kept, neither the normalised x nor what the activation was of.
    return (y.reshape(x.shape).astype(x.dtype), *statistics), (x, scale, bias, mean, var)


def _batch_norm_backward(groups: int, epsilon: float, activation: str, residuals, cotangents):
    x, scale, bias, mean, var = residuals
    x = lax.optimization_barrier(x)  # or XLA would keep the forward pass's sigmoid in memory
    # As forwards; reductions have the shape of mean and var.
    parts, axes = _parts(x.astype(jnp.float32), groups)
    # Those of mean and var are left out: running statistics are no part of the loss.
    upstream = cotangents[0].reshape(parts.shape).astype(jnp.float32)
    inverse = lax.rsqrt(var + epsilon)
    activated = (parts - mean) * (inverse * scale) + bias
    upstream = upstream * SLOPES[activation](activated)
    by_bias = jnp.sum(upstream, axes, keepdims=True)
    # sum(upstream * normalised), by sums over x itself: one pass gives both.
    by_scale = (jnp.sum(upstream * parts, axes, keepdims=True) - mean * by_bias) * inverse
    # Ioffe & Szegedy 2015, section 3, with the gradients of mean and variance put in.
    count = parts.size // (groups * x.shape[-1])
    normalised = (parts - mean) * inverse
    by_x = scale * inverse * (upstream - (by_bias + normalised * by_scale) / count)
    # Scale and bias are shared by the groups: [C].
    total = functools.partial(jnp.sum, axis=tuple(range(parts.ndim - 1)))
    return by_x.reshape(x.shape).astype(x.dtype), total(by_scale), total(by_bias)


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
    """activation(batch_norm(x @ kernel)), without a pass over x @ kernel for its statistics.

    The product is linear, so its mean is mean(x) @ kernel, and its variance the diagonal of
    kernel^T cov(x) kernel. Known beforehand, they go into the kernel. Backwards alike: what batch
    normalisation adds to the gradient is a linear map of x. It costs two products with the
    [K, K] covariance, and saves five passes over [N, H, W, C], where C is 6 K in EfficientNet.

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
    # Centered first, unlike in `batch_norm`: kernel^T cov(x) kernel is a sum of K^2 terms that
    # cancel, and would keep the error of E[x y] - E[x] E[y]. x is narrow, so its copy is cheap.
    center, centered = _centered(parts)
    covariance = grouped_moments(centered, centered) / _positions(parts)
    # [groups, C] each, but spread [groups, K, C] = cov(x) @ kernel, which the gradient wants again.
    mean = _exact("gk,kc->gc", center, kernel)
    spread = _exact("gkl,lc->gkc", covariance, kernel)
    var = jnp.maximum(jnp.sum(kernel * spread, 1), 0.0)
    multiplier = scale * lax.rsqrt(var + epsilon)
    # [groups, K, C]: a kernel per group, as each has its own deviations.
    weights = (kernel * multiplier[:, None]).astype(x.dtype)
    # Already normalised but for the shift, since the deviations are in the weights.
    product = grouped_pointwise(parts, weights)
    # With the rounded weights' mean: in bfloat16 the other is a little off.
    shift = _per_group(bias - _exact("gk,gkc->gc", center, weights))
    y = ACTIVATIONS[activation](product + shift).astype(x.dtype).reshape(*x.shape[:-1], -1)
    # Of the maps of C channels the product alone is kept; its activation is computed again.
    return (y, mean, var), (x, kernel, scale, product, shift, spread, var)


def _pointwise_backward(groups: int, epsilon: float, activation: str, residuals, cotangents):
    x, kernel, scale, product, shift, spread, var = residuals
    parts = x.reshape(groups, -1, *x.shape[1:])
    product = lax.optimization_barrier(product)  # as in _batch_norm_backward
    upstream = cotangents[0].reshape(product.shape) * SLOPES[activation](product + shift)
    # Rounded before the products, as the forward pass rounds its factors.
    upstream = upstream.astype(x.dtype)
    _, centered = _centered(parts)
    # [groups, C], and [groups, K, C]: x centered takes the mean's part out of it.
    by_bias = jnp.sum(upstream, (1, 2, 3), dtype=jnp.float32)
    by_kernel = grouped_moments(centered, upstream)
    inverse = lax.rsqrt(var + epsilon)
    # sum(upstream * normalised) without the wide normalised, which is inverse * centered @ kernel.
    by_scale = inverse * jnp.sum(kernel * by_kernel, 1)
    # [groups, 1, C] each.
    slope, pull = (scale * inverse)[:, None], (inverse * by_scale)[:, None]
    by_kernel = jnp.sum(slope * (by_kernel - spread * pull), 0)
    # The gradient of the product, (upstream - mean(upstream) - normalised * mean(upstream *
    # normalised)) * slope, times kernel^T; normalised is linear in x, so its term is, too.
    steepened = (kernel * slope).astype(x.dtype)
    # [groups, K, K] and [groups, K]: all that statistics add to the gradient, in x's own width.
    correction = _product("gkc,lc->glk", kernel * slope * pull, kernel) / _positions(parts)
    constant = _product("gc,gkc->gk", by_bias, kernel * slope) / _positions(parts)
    # [groups, N / groups, H, W, K].
    by_x = grouped_pointwise(upstream, steepened.swapaxes(1, 2))
    by_x = by_x - grouped_pointwise(centered, correction.astype(x.dtype)) - _per_group(constant)
    by_x = by_x.reshape(x.shape).astype(x.dtype)
    return by_x, by_kernel.astype(kernel.dtype), by_scale.sum(0), by_bias.sum(0)


pointwise_batch_norm.defvjp(_pointwise_forward, _pointwise_backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_exact = functools.partial(_product, precision=lax.Precision.HIGHEST)  # small, and decide the rest


def _parts(x: Array, groups: int) -> tuple[Array, tuple[int, ...]]:
    """Returns [groups, N / groups, ..., C], and the axes that statistics are taken over.

    One group is x itself. A reshape to [1, N, ..., C] moves nothing, but behind it XLA's CPU
    compiler computes x once more for each reader, all taps of a depthwise convolution with it.
    """
    if groups > 1:
        x = x.reshape(groups, -1, *x.shape[1:])
    return x, tuple(range(int(groups > 1), x.ndim - 1))


def _positions(parts: Array) -> int:
    return parts[0, ..., 0].size


def _per_group(x: Array) -> Array:
    return x[:, None, None, None]


def _centered(parts: Array) -> tuple[Array, Array]:
    """The mean of each part, [groups, K], float32, and the parts less it, of their dtype."""
    center = jnp.mean(parts, (1, 2, 3), dtype=jnp.float32)
    # In their dtype: in bfloat16 both products then read half of what float32 would take.
    return center, (parts - _per_group(center)).astype(parts.dtype)


def _silu_slope(x: Array) -> Array:
    # (x sigmoid)' = sigmoid + x sigmoid (1 - sigmoid), with one exponential.
    sigmoid = nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


# With respect to what is activated. At a corner it is 0, as torch has it.
SLOPES = {
    "none": jnp.ones_like,
    "silu": _silu_slope,
    "relu": lambda x: (x > 0).astype(x.dtype),
    "relu6": lambda x: ((x > 0) & (x < 6)).astype(x.dtype),
}
