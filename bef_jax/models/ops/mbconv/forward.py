"""The Pallas kernels of a block's forward pass, in the order in which they are called."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from bef_jax.models.ops.activations import ACTIVATIONS
from bef_jax.models.ops.mbconv import vectors
from bef_jax.models.ops.mbconv.grid import (
    LANES,
    Strip,
    Window,
    call_kernel,
    floats,
    maps_spec,
    weights_spec,
    whole_spec,
)


def expand_and_convolve(
    x: Array,
    expand: Array | None,
    shift: Array | None,
    taps: Array,
    strip: Strip,
    activation: str,
) -> tuple[Array, Array]:
    """Computes expansion, activation and depthwise convolution, and sums for the norm after them.

    Args:
        x: [H, W, K, N], floating; N a multiple of 128.
        expand: [E, K], of x's dtype.
        shift: [E, 1], float32.
        taps: [E, k * k], float32.
        strip: the strip of the maps that has the rows of x.

    Returns:
        d: [H', W', E, N], of x's dtype: depthwise(activation(expand @ x + shift)).
        moments: [2, E, N], float32, the sums over positions of d and of d^2.
    """
    window, tile = strip.window, strip.channels
    kernel = functools.partial(
        _expand_and_convolve, window=window, activation=ACTIVATIONS[activation]
    )
    (hidden, count), images = taps.shape, x.shape[-1]
    x_spec = maps_spec if expand is None else whole_spec
    inputs = [(x, x_spec), (expand, weights_spec), (shift, weights_spec), (taps, weights_spec)]
    result = jax.ShapeDtypeStruct((*window.outputs, hidden, images), x.dtype)
    outputs = [(result, maps_spec), (floats((2, hidden, images)), maps_spec)]
    scratch = [((*window.phases, tile, LANES), jnp.float32), vectors.wide_shape(count, tile)]
    expanded = 0 if expand is None else math.prod(window.size) * hidden * images
    products = expanded * x.shape[-2] + result.size * count
    return call_kernel(kernel, inputs, outputs, scratch, tile, products, expanded)


def _expand_and_convolve(
    x, expand, shift, taps, d, moments, padded, wide, *, window: Window, activation: Callable
):
    @pl.when(pl.program_id(1) == 0)
    def _():
        vectors.clear(padded)  # the margins stay 0; the rest is written for each tile

    moments[...] = jnp.zeros_like(moments)
    vectors.widen(taps, wide)

    def fill(position, z):
        padded[position] = z if expand is None else activation(z)

    def convolve(row, _):
        for columns, channels in vectors.pieces(window.outputs[1], len(taps)):
            taken = (
                vectors.tap(padded, row, columns, channels, i, j, window.stride)
                for i, j in window.taps
            )
            total = sum(part * wide[index, channels] for index, part in enumerate(taken))
            d[row, columns, channels] = total.astype(d.dtype)
            moments[0, channels] += total.sum(0)
            moments[1, channels] += (total * total).sum(0)

    vectors.each_hidden(x, expand, shift, window, fill)
    lax.fori_loop(0, window.outputs[0], convolve, None)


def pool(d: Array, norm: Array, tile: int, activation: str) -> Array:
    """Returns the sums over positions of activation(d * factor + offset), [E, N], float32.

    Args:
        d: [H', W', E, N], from `expand_and_convolve`.
        norm: [E, 2], float32, factor and offset.
    """
    kernel = functools.partial(_pool, activation=ACTIVATIONS[activation])
    inputs, outputs = [(d, maps_spec), (norm, weights_spec)], [(floats(d.shape[2:]), maps_spec)]
    return call_kernel(
        kernel, inputs, outputs, [vectors.wide_shape(2, tile)], tile, d.size, d.size
    )[0]


def _pool(d, norm, pooled, wide, *, activation: Callable):
    pooled[...] = jnp.zeros_like(pooled)
    vectors.widen(norm, wide)

    def add(row, _):
        for column in range(d.shape[1]):
            pooled[...] += activation(vectors.affine(d[row, column].astype(jnp.float32), wide))

    lax.fori_loop(0, d.shape[0], add, None)


def project(
    d: Array, norm: Array, gate: Array, weights: Array, tile: int, activation: str
) -> Array:
    """Returns weights^T @ (activation(d * factor + offset) * gate), [H', W', M, N], d's dtype.

    Args:
        d, norm: as in `pool`.
        gate: [E, N], float32.
        weights: [E, M], of d's dtype.
    """
    kernel = functools.partial(_project, activation=ACTIVATIONS[activation])
    shape = (*d.shape[:2], weights.shape[1], d.shape[3])
    inputs = [(d, maps_spec), (norm, weights_spec), (gate, maps_spec), (weights, weights_spec)]
    outputs = [(jax.ShapeDtypeStruct(shape, d.dtype), whole_spec)]
    scratch = [((*shape[:3], LANES), jnp.float32), vectors.wide_shape(2, tile)]
    products = d.size * weights.shape[1]
    return call_kernel(kernel, inputs, outputs, scratch, tile, products, d.size)[0]


def _project(d, norm, gate, weights, y, total, wide, *, activation: Callable):
    vectors.widen(norm, wide)

    def add(row, _):
        for column in range(d.shape[1]):
            value = d[row, column].astype(jnp.float32)
            gated = activation(vectors.affine(value, wide)) * gate[...]
            total[row, column] += vectors.dot(weights[...], gated.astype(d.dtype), over=0)

    vectors.accumulate(total, y, lambda: lax.fori_loop(0, d.shape[0], add, None))
