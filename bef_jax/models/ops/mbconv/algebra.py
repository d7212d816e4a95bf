"""The algebra between the kernels: norms and squeeze-excite, from sums and back.

Of one group of the batch. Maps are [H, W, C, n]; K, E and M are the channels of a block's input, of
its hidden maps and of its output.
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
    """The 1 x 1 convolution with its norm in it: weights^T x + shift, as in `norm`.

    Attributes:
        weights: [K, E], of the activations' dtype, the kernel times the norm's factor.
        shift: [E].
        center: [K], the mean of x.
        spread: [K, E], cov(x) @ kernel.
        inverse: [E], 1 / deviation of kernel^T x.
    """

    weights: Array
    shift: Array
    center: Array
    spread: Array
    inverse: Array


@struct.dataclass
class Norm:
    """The norm behind the depthwise convolution: [E] each."""

    mean: Array
    inverse: Array  # 1 / deviation
    factor: Array  # the norm is factor * d + offset
    offset: Array


def like(params: Params, gradient: Array) -> Params:
    """A kernel's gradient, whatever its axes are, as the kernel is kept."""
    return {"kernel": gradient.reshape(params["kernel"].shape)}


def excite(params: Params | None, pooled: Array) -> Array:
    """`layers.SqueezeExcite`'s gate of the pooled features, [E, n] both; without parameters 1."""
    if params is None:
        return jnp.ones_like(pooled)
    reduce, expand = params["reduce"], params["expand"]
    hidden = nn.silu(pooled.T @ reduce["kernel"] + reduce["bias"])
    return nn.sigmoid(hidden @ expand["kernel"] + expand["bias"]).T


def expansion(x: Array, params: Params, epsilon: float) -> tuple[Expansion | None, Params]:
    """The expansion with its norm in it, and the norm's statistics; None and {} where none is.

    As in `norm.pointwise_batch_norm`: the product's statistics by those of x.
    """
    if "expand_conv" not in params:
        return None, {}
    kernel, norm = params["expand_conv"]["kernel"][0, 0], params["expand_norm"]
    center = jnp.mean(x, (0, 1, 3), dtype=jnp.float32)
    centered = _centered(x, center)
    covariance = _product("hwkn,hwln->kl", centered, centered) / (x.size // len(center))
    mean, spread = _exact("k,ke->e", center, kernel), _exact("kl,le->ke", covariance, kernel)
    var = jnp.maximum(jnp.sum(kernel * spread, 0), 0.0)
    inverse = lax.rsqrt(var + epsilon)
    weights = (kernel * norm["scale"] * inverse).astype(x.dtype)
    shift = norm["bias"] - _exact("k,ke->e", center, weights)
    return Expansion(weights, shift, center, spread, inverse), {"expand_norm": (mean, var)}


def expansion_gradient(
    x: Array,
    expand: Expansion | None,
    params: Params,
    dx: Array,
    dexpand: Array | None,
    dshift: Array | None,
) -> tuple[Array, Params]:
    """The gradients of x [H, W, K, n] and of the convolution and its norm, from the kernels' sums.

    As in `norm.pointwise_batch_norm`: what statistics add to the gradient of x is linear in x.
    """
    if expand is None:
        return dx, {}
    kernel, count = params["expand_conv"]["kernel"][0, 0], x.size // len(expand.center)
    factor = params["expand_norm"]["scale"] * expand.inverse
    dbias = dshift.sum(-1)
    dkernel = dexpand.sum(0).T - expand.center[:, None] * dbias
    dscale = expand.inverse * jnp.sum(kernel * dkernel, 0)
    pull = expand.inverse * dscale
    correction = _exact("ke,le->kl", kernel * factor * pull, kernel) / count
    constant = _exact("ke,e->k", kernel * factor, dbias) / count
    centered = _centered(x, expand.center)
    dx = dx - jnp.einsum("hwkn,kl->hwln", centered, correction.astype(x.dtype))
    dx = (dx - constant[:, None]).astype(x.dtype)
    dkernel = factor * (dkernel - expand.spread * pull)
    dparams = {
        "expand_conv": like(params["expand_conv"], dkernel),
        "expand_norm": {"scale": dscale, "bias": dbias},
    }
    return dx, dparams


def _centered(x: Array, center: Array) -> Array:
    # In its own dtype: in bfloat16 products then read half of what float32 would take.
    return (x - center[:, None]).astype(x.dtype)


def norm(moments: Array, params: Params, positions: int, epsilon: float) -> tuple[Norm, Array]:
    """The norm of d and its variance [E].

    Args:
        moments: [2, E, n], from `forward.spread`.
        positions: H' * W'.
    """
    mean, square = moments.sum(-1) / (positions * moments.shape[-1])
    var = jnp.maximum(square - mean * mean, 0.0)
    inverse = lax.rsqrt(var + epsilon)
    factor = params["scale"] * inverse
    return Norm(mean, inverse, factor, params["bias"] - mean * factor), var


def norm_gradient(
    norm: Norm, sums: Array, gate: Array, pull: Array, positions: int
) -> tuple[Params, tuple[Array, Array]]:
    """The gradients of scale and bias, and factor and offset of d in its own gradient.

    Args:
        sums: [5, E, n], from `backward.project_gradients`.
        gate, pull: [E, n]; the gradient of the activated maps is (gradient of gated) gate + pull.
        positions: H' * W'.
    """
    count = positions * gate.shape[-1]
    dbias = jnp.sum(gate * sums[1] + pull * sums[3], -1)
    dscale = jnp.sum(gate * sums[2] + pull * sums[4], -1)
    dscale = (dscale - norm.mean * dbias) * norm.inverse
    # Ioffe & Szegedy 2015, section 3, sorted by d.
    factor = -norm.factor * norm.inverse * dscale / count
    offset = -norm.factor * dbias / count - factor * norm.mean
    return {"scale": dscale, "bias": dbias}, (factor, offset)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_exact = functools.partial(_product, precision=lax.Precision.HIGHEST)  # small, and decide the rest
