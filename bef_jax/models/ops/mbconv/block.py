"""EfficientNet's block in training as one function with a custom gradient, for TPU.

It computes the layers of `efficientnet.MBConv`, from the expansion to the projection, by the
kernels of `forward` and `backward`. For the backward pass it keeps its narrow input and one wide
map. Norms and squeeze-excite need only sums of the wide maps per image and channel. The kernels
return these sums, and `algebra` does the rest.

The functions of a group take and return maps [n, H, W, C]; inside them, and in the kernels, maps
are [H, W, C, n]. d is the result of the depthwise convolution, E the number of hidden channels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from bef_jax.models.ops.mbconv import algebra, backward, forward
from bef_jax.models.ops.mbconv.algebra import Expansion, Params
from bef_jax.models.ops.mbconv.grid import Strip, Window, check_batch, strips
from bef_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """The static data that the kernels need when a block is traced.

    Attributes:
        strips: the strips of rows that the maps are cut into (`grid.strips`).
        groups: number of parts of the batch that have their own statistics.
        epsilon: added to variances.
        activation: a name in `ACTIVATIONS`.
    """

    strips: tuple[Strip, ...]
    groups: int
    epsilon: float
    activation: str


def plan_kernels(
    window: Window,
    x: Array,
    expand_ratio: int,
    features: int,
    groups: int,
    epsilon: float,
    activation: str,
) -> KernelPlan:
    """Returns the plan for a block with the input x, [N, H, W, K].

    Args:
        window: geometry of the depthwise convolution.
        expand_ratio: hidden channels divided by K; 1 for a block without expansion.
        features: M, channels of the output.
        groups, epsilon, activation: options of the norms.

    Raises:
        UserError: the batch is not a multiple of 128 * groups, or maps do not fit on the chip.
    """
    check_batch(x.shape[0], groups)
    channels = x.shape[-1], x.shape[-1] * expand_ratio, features
    return KernelPlan(strips(window, *channels, x.dtype.itemsize), groups, epsilon, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mbconv(x: Array, params: Params, plan: KernelPlan) -> tuple[Array, Params]:
    """Expands, convolves depthwise, gates by squeeze-excite, and projects.

    The norms after the expansion and after the depthwise convolution are included.

    Args:
        x: [N, H, W, K]; N a multiple of 128 * groups.
        params: parameters of these layers, by their names in `efficientnet.MBConv`. Without
            expand_conv and expand_norm, x is not expanded. Without squeeze_excite there is no gate.

    Returns:
        y: [N, H', W', M], of x's dtype, before the projection's norm.
        statistics: {norm's name: (mean, variance)}, [groups, E] each, float32, through which no
            gradient flows.
    """
    return _forward(x, params, plan)[0]


def _forward(x: Array, params: Params, plan: KernelPlan):
    parts = x.reshape(plan.groups, -1, *x.shape[1:])
    y, statistics, kept = _by_group(functools.partial(_group_forward, plan), parts, params)
    return (y.reshape(-1, *y.shape[2:]), statistics), (parts, params, kept)


def _backward(plan: KernelPlan, residuals, cotangents):
    parts, params, kept = residuals
    dy, _ = cotangents  # no gradient flows through the statistics
    dy = dy.reshape(plan.groups, -1, *dy.shape[1:])
    function = functools.partial(_group_backward, plan)
    dx, dparams = _by_group(function, (parts, kept, dy), params)
    # Sum over groups, and so over devices, here and not in the kernels. So XLA can merge this sum
    # with that of the step's other gradients.
    dparams = jax.tree.map(lambda by_group: by_group.sum(0), dparams)
    return dx.reshape(-1, *dx.shape[2:]), dparams


mbconv.defvjp(_forward, _backward)


def _by_group(function: Callable, parts: Any, params: Params) -> Any:
    """Returns function(part, params) for each part of the first axis, on the device that holds it.

    The results are stacked along a new first axis.
    """

    def on_one_device(parts, params):
        leaves, structure = jax.tree.flatten(parts)
        each = (structure.unflatten(leaves) for leaves in zip(*leaves, strict=True))
        results = [function(part, params) for part in each]
        return jax.tree.map(lambda *values: jnp.stack(values), *results)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return on_one_device(parts, params)
    # XLA can't split our kernels over devices by itself. It would copy all parts to all devices.
    sharded, replicated = PartitionSpec(sharding.AXIS), PartitionSpec()
    specs = {"in_specs": (sharded, replicated), "out_specs": sharded, "check_vma": False}
    return jax.shard_map(on_one_device, mesh=mesh, **specs)(parts, params)


# ---- one group ----------------------------------------------------------------------------------


def _group_forward(plan: KernelPlan, x: Array, params: Params):
    """Returns y [n, H', W', M], the norms' statistics, and residuals for the backward pass.

    x is [n, H, W, K].
    """
    x, act = x.transpose(1, 2, 3, 0), plan.activation
    taps, projection = _taps_and_projection(params, x.dtype)
    expand, statistics = algebra.expansion(x, params, plan.epsilon)
    convolved = [
        forward.expand_and_convolve(
            _rows(x, strip.inputs), *_expansion_arrays(expand), taps, strip, act
        )
        for strip in plan.strips
    ]
    d, moments = [maps for maps, _ in convolved], _sum([sums for _, sums in convolved])
    positions = _positions(d)
    norm, variance = algebra.depthwise_norm(moments, params, positions, plan.epsilon)
    coefficients = jnp.stack([norm.factor, norm.offset], 1)
    tiled = [(maps, strip.channels) for maps, strip in zip(d, plan.strips, strict=True)]
    pooled = _sum([forward.pool(maps, coefficients, tile, act) for maps, tile in tiled]) / positions
    gate = algebra.excite(params.get("squeeze_excite"), pooled)
    y = [forward.project(maps, coefficients, gate, projection, tile, act) for maps, tile in tiled]
    y = jnp.concatenate(y).transpose(3, 0, 1, 2)
    statistics["depthwise_norm"] = norm.mean, variance
    return y, statistics, (expand, norm, pooled, d)


def _group_backward(plan: KernelPlan, part, params: Params) -> tuple[Array, Params]:
    """Returns the gradients of x [n, H, W, K] and of the parameters; dy is the gradient of y.

    `part` is (x, residuals of `_group_forward`, dy).
    """
    x, (expand, norm, pooled, d), dy = part
    x, dy, act = x.transpose(1, 2, 3, 0), dy.transpose(1, 2, 3, 0), plan.activation
    by_strip = [(s, maps, _rows(dy, s.outputs)) for s, maps in zip(plan.strips, d, strict=True)]
    dparams, coefficients, gate_and_pull = _gated_backward(by_strip, norm, pooled, params, act)
    taps, projection = _taps_and_projection(params, x.dtype)
    weights, shift = _expansion_arrays(expand)
    shift = jnp.zeros_like(coefficients[:, :1]) if shift is None else shift
    weights = weights, taps, projection, jnp.concatenate([coefficients, shift], 1)
    results = [
        backward.expand_and_convolve_gradients(
            _rows(x, strip.inputs), *maps, weights, gate_and_pull, strip, act
        )
        for strip, *maps in by_strip
    ]
    dx = _overlapped([result[0] for result in results], plan.strips, len(x))
    dexpand, dshift, dtaps = _sum([result[1:] for result in results])
    dx, dexpansion = algebra.expansion_gradient(x, expand, params, dx, dexpand, dshift)
    dtaps = algebra.kernel_gradient(params["depthwise_conv"], dtaps.sum(0).T)
    dparams = {**dparams, **dexpansion, "depthwise_conv": dtaps}
    return dx.transpose(3, 0, 1, 2), {name: dparams[name] for name in params}


def _gated_backward(
    by_strip: list, norm: algebra.Norm, pooled: Array, params: Params, act: str
) -> tuple[Params, Array, Array]:
    """Computes the gradients of the projection, squeeze-excite and the norm, from y back to d.

    Args:
        by_strip: (strip, its d, its gradient of y) of each strip.

    Returns:
        The gradients of the parameters; the first four columns of the coefficients, [E, 4]; and
        gate_and_pull [2, E, n], as `backward.expand_and_convolve_gradients` takes them.
    """
    positions = _positions([d for _, d, _ in by_strip])
    _, projection = _taps_and_projection(params, by_strip[0][1].dtype)
    coefficients = jnp.stack([norm.factor, norm.offset], 1)
    gate, excite_gradient = jax.vjp(algebra.excite, params.get("squeeze_excite"), pooled)
    results = [
        backward.project_gradients(*maps, coefficients, gate, projection, strip.channels, act)
        for strip, *maps in by_strip
    ]
    sums, dprojection = _sum(results)
    dexcite, dpooled = excite_gradient(sums[0])
    pull = dpooled / positions  # the share of each position in the gradient of the mean
    dnorm, from_statistics = algebra.depthwise_norm_gradient(norm, sums, gate, pull, positions)
    dprojection = algebra.kernel_gradient(params["project_conv"], dprojection.sum(0))
    dparams = {
        "depthwise_norm": dnorm, "project_conv": dprojection, "squeeze_excite": dexcite,
    }  # fmt: skip
    coefficients = jnp.stack([norm.factor, norm.offset, *from_statistics], 1)
    return dparams, coefficients, jnp.stack([gate, pull])


def _rows(maps: Array, rows: tuple[int, int]) -> Array:
    return maps[slice(*rows)]


def _overlapped(parts: list[Array], strips: tuple[Strip, ...], height: int) -> Array:
    """Joins the strips' gradients of x, and adds them up where two strips share input rows."""
    margins = [(strip.inputs[0], height - strip.inputs[1]) for strip in strips]
    rest = ((0, 0),) * 3
    return sum(jnp.pad(part, (rows, *rest)) for part, rows in zip(parts, margins, strict=True))


def _sum(results: list) -> Any:
    return jax.tree.map(lambda *values: sum(values), *results)


def _positions(maps_by_strip: list[Array]) -> int:
    return sum(math.prod(maps.shape[:2]) for maps in maps_by_strip)


def _expansion_arrays(expand: Expansion | None) -> tuple[Array | None, Array | None]:
    """Returns the weights [E, K] and the shift [E, 1] of an expansion, for the kernels."""
    return (None, None) if expand is None else (expand.weights.T, expand.shift[:, None])


def _taps_and_projection(params: Params, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns the depthwise taps [E, k * k] and the projection [E, M], for the kernels."""
    taps, projection = params["depthwise_conv"]["kernel"], params["project_conv"]["kernel"]
    return taps.reshape(-1, taps.shape[-1]).T, projection[0, 0].astype(dtype)
