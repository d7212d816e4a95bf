"""EfficientNet's block in training as one function, with a gradient of its own, for TPU.

It computes what `efficientnet.MBConv` composes of layers, from the expansion to the projection, by
the kernels of `mbconv_kernels`. For the backward pass it keeps its narrow input and one wide map.
What norms and squeeze-excite need of wide maps are sums per image and channel, which the kernels
bring along; the rest is algebra.

Within a group of the batch maps are [H, W, C, N], as the kernels have them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import PartitionSpec

from bef_jax import sharding
from bef_jax.models import mbconv_kernels as kernels
from bef_jax.models.mbconv_grid import Window

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Block:
    """What of a block is known when it is traced.

    Attributes:
        window: of its depthwise convolution.
        channels: that the kernels take at a time (`mbconv_grid.channel_block`).
        groups: parts of the batch with statistics of their own.
        epsilon: added to variances.
        activation: of `norm.ACTIVATIONS`.
    """

    window: Window
    channels: int
    groups: int
    epsilon: float
    activation: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mbconv(x: Array, params: Params, block: Block) -> tuple[Array, Params]:
    """Expands, convolves by channel, gates by squeeze-excite and projects, with both norms within.

    Args:
        x: [N, H, W, K]; N a multiple of 128 * groups.
        params: of these layers, by their names in `efficientnet.MBConv`; without expand_conv and
            expand_norm x is not expanded, without squeeze_excite there is no gate.

    Returns:
        y: [N, H', W', M], of x's dtype, before the projection's norm.
        statistics: {norm's name: (mean, variance)}, [groups, E] each, float32, through which no
            gradient flows.
    """
    return _forward(x, params, block)[0]


def _forward(x: Array, params: Params, block: Block):
    parts = x.reshape(block.groups, -1, *x.shape[1:])
    y, statistics, kept = _by_group(functools.partial(_group_forward, block), parts, params)
    return (y.reshape(-1, *y.shape[2:]), statistics), (parts, params, kept)


def _backward(block: Block, residuals, cotangents):
    parts, params, kept = residuals
    by_y = cotangents[0].reshape(block.groups, -1, *cotangents[0].shape[1:])
    function = functools.partial(_group_backward, block)
    by_x, by_params = _by_group(function, (parts, kept, by_y), params)
    # Over groups, and so over devices, once for all parameters: with the step's other gradients.
    by_params = jax.tree.map(lambda by_group: by_group.sum(0), by_params)
    return by_x.reshape(-1, *by_x.shape[2:]), by_params


mbconv.defvjp(_forward, _backward)


def _by_group(function: Callable, parts: Any, params: Params) -> Any:
    """function(part, params) for each part along the first axis, on the device that holds it."""

    def here(parts, params):
        leaves, structure = jax.tree.flatten(parts)
        each = (structure.unflatten(leaves) for leaves in zip(*leaves, strict=True))
        results = [function(part, params) for part in each]
        return jax.tree.map(lambda *values: jnp.stack(values), *results)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return here(parts, params)
    # XLA can't cut a kernel of ours by itself: it would bring all parts to all devices.
    cut, everywhere = PartitionSpec(sharding.AXIS), PartitionSpec()
    specs = {"in_specs": (cut, everywhere), "out_specs": cut, "check_vma": False}
    return jax.shard_map(here, mesh=mesh, **specs)(parts, params)


# ---- one group ----------------------------------------------------------------------------------


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


def _group_forward(block: Block, x: Array, params: Params):
    """[n, H, W, K] -> y [n, H', W', M], the norms' statistics, and what the gradient needs."""
    x = x.transpose(1, 2, 3, 0)
    taps, project = _weights(params, x.dtype)
    expand, statistics = _expansion(x, params, block.epsilon)
    options = block.channels, block.activation
    d, moments = kernels.spread(x, *_factors(expand), taps, block.window, *options)
    norm, variance = _norm(moments, params["depthwise_norm"], d, block.epsilon)
    columns = jnp.stack([norm.factor, norm.offset], 1)
    pooled = kernels.pool(d, columns, *options) / math.prod(d.shape[:2])
    gate = _excite(params.get("squeeze_excite"), pooled)
    y = kernels.project(d, columns, gate, project, *options)
    statistics["depthwise_norm"] = norm.mean, variance
    return y.transpose(3, 0, 1, 2), statistics, (expand, norm, pooled, d)


def _group_backward(block: Block, part, params: Params) -> tuple[Array, Params]:
    """The gradients of x [n, H, W, K] and of the parameters, from that of y."""
    x, (expand, norm, pooled, d), by_y = part
    x, by_y = (maps.transpose(1, 2, 3, 0) for maps in (x, by_y))
    taps, project = _weights(params, x.dtype)
    gate, excite_gradient = jax.vjp(_excite, params.get("squeeze_excite"), pooled)
    columns = jnp.stack([norm.factor, norm.offset], 1)
    options = block.channels, block.activation
    sums, by_project = kernels.project_gradients(d, by_y, columns, gate, project, *options)
    by_excite, by_pooled = excite_gradient(sums[0])
    pull = by_pooled / math.prod(d.shape[:2])  # of the mean, on each position
    by_norm, by_d = _norm_gradient(norm, sums, gate, pull, d)
    weight, shift = _factors(expand)
    shift = jnp.zeros_like(norm.factor) if shift is None else shift[:, 0]
    columns = jnp.stack([norm.factor, norm.offset, *by_d, shift], 1)
    weights = weight, taps, project, columns
    images = jnp.stack([gate, pull])
    sums = kernels.spread_gradients(x, d, by_y, weights, images, block.window, *options)
    by_x, by_expansion = _expansion_gradient(x, expand, params, *sums[:3])
    by_params = {
        **by_expansion,
        "depthwise_conv": _like(params["depthwise_conv"], sums[3].sum(0).T),
        "depthwise_norm": by_norm,
        "project_conv": _like(params["project_conv"], by_project.sum(0)),
        "squeeze_excite": by_excite,
    }
    return by_x.transpose(3, 0, 1, 2), {name: by_params[name] for name in params}


def _factors(expand: Expansion | None) -> tuple[Array | None, Array | None]:
    """Weights [E, K] and shift [E, 1] of an expansion, as the kernels take them."""
    return (None, None) if expand is None else (expand.weights.T, expand.shift[:, None])


def _weights(params: Params, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The depthwise taps [E, k * k] and the projection [E, M], as the kernels take them."""
    taps, project = params["depthwise_conv"]["kernel"], params["project_conv"]["kernel"]
    return taps.reshape(-1, taps.shape[-1]).T, project[0, 0].astype(dtype)


def _like(params: Params, gradient: Array) -> Params:
    return {"kernel": gradient.reshape(params["kernel"].shape)}


def _excite(params: Params | None, pooled: Array) -> Array:
    """`layers.SqueezeExcite`'s gate of the pooled features, [E, n] both; without parameters 1."""
    if params is None:
        return jnp.ones_like(pooled)
    reduce, expand = params["reduce"], params["expand"]
    hidden = nn.silu(pooled.T @ reduce["kernel"] + reduce["bias"])
    return nn.sigmoid(hidden @ expand["kernel"] + expand["bias"]).T


def _expansion(x: Array, params: Params, epsilon: float) -> tuple[Expansion | None, Params]:
    """The expansion with its norm in it, and the norm's statistics; None and {} where none is.

    As in `norm.pointwise_batch_norm`: the product's statistics by those of x.
    """
    if "expand_conv" not in params:
        return None, {}
    kernel, norm = params["expand_conv"]["kernel"][0, 0], params["expand_norm"]
    center, centered = _centered(x)
    covariance = _product("hwkn,hwln->kl", centered, centered) / (x.size // len(center))
    mean, spread = _exact("k,ke->e", center, kernel), _exact("kl,le->ke", covariance, kernel)
    var = jnp.maximum(jnp.sum(kernel * spread, 0), 0.0)
    inverse = lax.rsqrt(var + epsilon)
    weights = (kernel * norm["scale"] * inverse).astype(x.dtype)
    shift = norm["bias"] - _exact("k,ke->e", center, weights)
    return Expansion(weights, shift, center, spread, inverse), {"expand_norm": (mean, var)}


def _expansion_gradient(
    x: Array,
    expand: Expansion | None,
    params: Params,
    by_x: Array,
    by_expand: Array | None,
    by_shift: Array | None,
) -> tuple[Array, Params]:
    """The gradients of x [H, W, K, n] and of the convolution and its norm, from the kernels' sums.

    As in `norm.pointwise_batch_norm`: what statistics add to the gradient of x is linear in x.
    """
    if expand is None:
        return by_x, {}
    kernel, count = params["expand_conv"]["kernel"][0, 0], x.size // len(expand.center)
    factor = params["expand_norm"]["scale"] * expand.inverse
    by_bias = by_shift.sum(-1)
    by_kernel = by_expand.sum(0).T - expand.center[:, None] * by_bias
    by_scale = expand.inverse * jnp.sum(kernel * by_kernel, 0)
    pull = expand.inverse * by_scale
    correction = _exact("ke,le->kl", kernel * factor * pull, kernel) / count
    constant = _exact("ke,e->k", kernel * factor, by_bias) / count
    _, centered = _centered(x)
    by_x = by_x - jnp.einsum("hwkn,kl->hwln", centered, correction.astype(x.dtype))
    by_x = (by_x - constant[:, None]).astype(x.dtype)
    by_kernel = factor * (by_kernel - expand.spread * pull)
    by_params = {
        "expand_conv": _like(params["expand_conv"], by_kernel),
        "expand_norm": {"scale": by_scale, "bias": by_bias},
    }
    return by_x, by_params


def _centered(x: Array) -> tuple[Array, Array]:
    """The mean [K], float32, and x less it, of its own dtype."""
    center = jnp.mean(x, (0, 1, 3), dtype=jnp.float32)
    return center, (x - center[:, None]).astype(x.dtype)


def _norm(moments: Array, params: Params, d: Array, epsilon: float) -> tuple[Norm, Array]:
    """The norm of d [H', W', E, n] and its variance [E], from the sums of d and d^2."""
    mean, square = moments.sum(-1) / (d.size // d.shape[2])
    var = jnp.maximum(square - mean * mean, 0.0)
    inverse = lax.rsqrt(var + epsilon)
    factor = params["scale"] * inverse
    return Norm(mean, inverse, factor, params["bias"] - mean * factor), var


def _norm_gradient(
    norm: Norm, sums: Array, gate: Array, pull: Array, d: Array
) -> tuple[Params, tuple[Array, Array]]:
    """The gradients of scale and bias, and factor and offset of d in its own gradient.

    Args:
        sums: [5, E, n], from `kernels.project_gradients`.
        gate, pull: [E, n]; the gradient of the activated maps is (gradient of gated) gate + pull.
    """
    count = d.size // d.shape[2]
    by_bias = jnp.sum(gate * sums[1] + pull * sums[3], -1)
    by_scale = jnp.sum(gate * sums[2] + pull * sums[4], -1)
    by_scale = (by_scale - norm.mean * by_bias) * norm.inverse
    # Ioffe & Szegedy 2015, section 3, sorted by d.
    factor = -norm.factor * norm.inverse * by_scale / count
    offset = -norm.factor * by_bias / count - factor * norm.mean
    return {"scale": by_scale, "bias": by_bias}, (factor, offset)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_exact = functools.partial(_product, precision=lax.Precision.HIGHEST)  # small, and decide the rest
