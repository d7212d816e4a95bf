"""The algebra between the kernels: norms and squeeze-excite from sums, and their gradients.

Everything is for one group of the batch. Maps are [H, W, C, n]. K, E and M are the channels of a
block's input, of its hidden maps and of its output.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

Params = dict[str, Any]


@struct.dataclass
class Expansion:
    """The 1 x 1 convolution that includes its norm: weights^T x + shift, as in `ops.norm`.

    Attributes:
        weights: [K, E], of the activations' dtype, the kernel times the norm's factor.
        shift: [E].
        center: [K], the mean of x.
        cov_kernel: [K, E], cov(x) @ kernel.
        inverse_std: [E], 1 / sqrt(variance of kernel^T x + epsilon).
    """

    weights: Array
    shift: Array
    center: Array
    cov_kernel: Array
    inverse_std: Array


@struct.dataclass
class Norm:
    """The norm after the depthwise convolution; each array is [E]."""

    mean: Array
    inverse_std: Array  # 1 / sqrt(variance + epsilon)
    factor: Array  # the norm is factor * d + offset
    offset: Array


def kernel_gradient(params: Params, gradient: Array) -> Params:
    """Returns {"kernel": gradient}, with the gradient in the shape of the kernel of `params`."""
    return {"kernel": gradient.reshape(params["kernel"].shape)}


def excite(params: Params | None, pooled: Array) -> Array:
    """Returns `layers.SqueezeExcite`'s gate [E, n] for `pooled` [E, n]; 1 without parameters."""
    if params is None:
        return jnp.ones_like(pooled)
    reduce, expand = params["reduce"], params["expand"]
    hidden = nn.silu(pooled.T @ reduce["kernel"] + reduce["bias"])
    return nn.sigmoid(hidden @ expand["kernel"] + expand["bias"]).T


def expansion(x: Array, params: Params, epsilon: float) -> tuple[Expansion | None, Params]:
    """Returns the expansion that includes its norm, and the norm's {name: (mean, variance)}.

    Without an expansion, they are None and {}. The product's statistics are computed from those of
    x, as in `ops.norm.pointwise_batch_norm`.
    """
    if "expand_conv" not in params:
        return None, {}
    kernel, expand_norm = params["expand_conv"]["kernel"][0, 0], params["expand_norm"]
    center = jnp.mean(x, (0, 1, 3), dtype=jnp.float32)
    centered = _centered(x, center)
    covariance = _product("hwkn,hwln->kl", centered, centered) / (x.size // len(center))
    mean, cov_kernel = _exact("k,ke->e", center, kernel), _exact("kl,le->ke", covariance, kernel)
    var = jnp.maximum(jnp.sum(kernel * cov_kernel, 0), 0.0)
    inverse_std = lax.rsqrt(var + epsilon)
    weights = (kernel * expand_norm["scale"] * inverse_std).astype(x.dtype)
    shift = expand_norm["bias"] - _exact("k,ke->e", center, weights)
    return Expansion(weights, shift, center, cov_kernel, inverse_std), {"expand_norm": (mean, var)}


def expansion_gradient(
    x: Array,
    expand: Expansion | None,
    params: Params,
    dx: Array,
    dexpand: Array | None,
    dshift: Array | None,
) -> tuple[Array, Params]:
    """Returns dx [H, W, K, n] and the gradients of the expansion's parameters.

    As in `ops.norm.pointwise_batch_norm`, the statistics add a linear map of x to dx.

    Args:
        dx, dexpand, dshift: from `backward.expand_and_convolve_gradients`, which takes the
            statistics as constants.
    """
    if expand is None:
        return dx, {}
    kernel, count = params["expand_conv"]["kernel"][0, 0], x.size // len(expand.center)
    factor = params["expand_norm"]["scale"] * expand.inverse_std
    dbias = dshift.sum(-1)
    moments = dexpand.sum(0).T - expand.center[:, None] * dbias
    dscale = expand.inverse_std * jnp.sum(kernel * moments, 0)
    dscale_over_std = expand.inverse_std * dscale
    correction = _exact("ke,le->kl", kernel * factor * dscale_over_std, kernel) / count
    constant = _exact("ke,e->k", kernel * factor, dbias) / count
    centered = _centered(x, expand.center)
    dx = dx - jnp.einsum("hwkn,kl->hwln", centered, correction.astype(x.dtype))
    dx = (dx - constant[:, None]).astype(x.dtype)
    dkernel = factor * (moments - expand.cov_kernel * dscale_over_std)
    dparams = {
        "expand_conv": kernel_gradient(params["expand_conv"], dkernel),
        "expand_norm": {"scale": dscale, "bias": dbias},
    }
    return dx, dparams


def _centered(x: Array, center: Array) -> Array:
    # The result keeps the dtype of x, so that in bfloat16 products read half the bytes.
    return (x - center[:, None]).astype(x.dtype)


def depthwise_norm(
    moments: Array, params: Params, positions: int, epsilon: float
) -> tuple[Norm, Array]:
    """Returns the norm of d, and the variance of d, [E].

    Args:
        moments: [2, E, n], from `forward.expand_and_convolve`.
        positions: H' * W'.
    """
    mean, square = moments.sum(-1) / (positions * moments.shape[-1])
    var = jnp.maximum(square - mean * mean, 0.0)
    inverse_std = lax.rsqrt(var + epsilon)
    factor = params["depthwise_norm"]["scale"] * inverse_std
    offset = params["depthwise_norm"]["bias"] - mean * factor
    return Norm(mean, inverse_std, factor, offset), var


def depthwise_norm_gradient(
    norm: Norm, sums: Array, gate: Array, pull: Array, positions: int
) -> tuple[Params, tuple[Array, Array]]:
    """Returns the gradients of scale and bias, and a pair (factor, offset), [E] each.

    The statistics add d * factor + offset to the gradient of d.

    Args:
        sums: [5, E, n], from `backward.project_gradients`.
        gate, pull: [E, n]; the gradient of the activated maps is (gradient of the gated maps) *
            gate + pull.
        positions: H' * W'.
    """
    count = positions * gate.shape[-1]
    dbias = jnp.sum(gate * sums[1] + pull * sums[3], -1)
    dscale = jnp.sum(gate * sums[2] + pull * sums[4], -1)
    dscale = (dscale - norm.mean * dbias) * norm.inverse_std
    # This is Ioffe & Szegedy 2015, section 3, written as a linear function of d.
    factor = -norm.factor * norm.inverse_std * dscale / count
    offset = -norm.factor * dbias / count - factor * norm.mean
    return {"scale": dscale, "bias": dbias}, (factor, offset)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
# This is for small products whose errors would spread to everything that follows.
_exact = functools.partial(_product, precision=lax.Precision.HIGHEST)
