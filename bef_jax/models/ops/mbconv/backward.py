"""The backward pass of a block as Pallas kernels, in the order in which it calls them."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from bef_jax.models.ops.mbconv import grid, vectors
from bef_jax.models.ops.mbconv.grid import LANES, Strip, Window
from bef_jax.models.ops.norm import ACTIVATIONS, SLOPES

_floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def project_gradients(
    d: Array, by_y: Array, norm: Array, gate: Array, weights: Array, block: int, activation: str
) -> tuple[Array, Array]:
    """The gradient of `project`'s weights, and the sums that those of gate and norm are made of.

    With u = weights @ by_y, the gradient of the gated maps, a = activation(z) and its slope s, at z
    = d * norm[0] + norm[1].

    Args:
        by_y: [H', W', M, N], of d's dtype, the gradient of what `project` gives.
        d, norm, gate, weights: as there.

    Returns:
        sums: [5, E, N], float32, the sums over positions of u a, u s, u s d, s and s d.
        by_weights: [N / 128, E, M], float32, by blocks of images.
    """
    functions = ACTIVATIONS[activation], SLOPES[activation]
    kernel = functools.partial(_project_gradients, functions=functions)
    (hidden, features), images = weights.shape, d.shape[-1]
    inputs = [(d, grid.maps), (by_y, grid.whole), (norm, grid.rows), (gate, grid.maps)]
    inputs.append((weights, grid.rows))
    outputs = [
        (_floats((5, hidden, images)), grid.maps),
        (_floats((images // LANES, hidden, features)), grid.parts),
    ]
    scratch, products = [vectors.wide_shape(2, block)], 2 * d.size * features
    return grid.run(kernel, inputs, outputs, scratch, block, products, 2 * d.size)


def _project_gradients(
    d, by_y, norm, gate, weights, sums, by_weights, wide, *, functions: tuple[Callable, Callable]
):
    activation, slope_of = functions
    sums[...] = jnp.zeros_like(sums)
    by_weights[...] = jnp.zeros_like(by_weights)
    vectors.widen(norm, wide)

    def add(row, _):
        for column in range(d.shape[1]):
            cotangent, value = by_y[row, column], d[row, column].astype(jnp.float32)
            z = vectors.affine(value, wide)
            activated, slope = activation(z), slope_of(z)
            upstream = vectors.dot(weights[...], cotangent)
            terms = upstream * activated, upstream * slope, upstream * slope * value
            for index, term in enumerate((*terms, slope, slope * value)):
                sums[index] += term
            gated = (activated * gate[...]).astype(d.dtype)
            by_weights[...] += vectors.dot(gated, cotangent, over=1)

    lax.fori_loop(0, d.shape[0], add, None)


def spread_gradients(
    x: Array,
    d: Array,
    by_y: Array,
    weights: tuple[Array | None, Array, Array, Array],
    images: Array,
    strip: Strip,
    activation: str,
) -> tuple[Array, Array | None, Array | None, Array]:
    """The gradients of `spread`, from that of what `project` gives.

    Args:
        x: as in `forward.spread`.
        d, by_y: as above.
        weights: expand [E, K]; taps [E, k * k]; those of `project` [E, M]; and columns [E, 5],
            float32: norm[0], norm[1], c and o, by which the gradient of d is (gradient of z) *
            norm[0] + d * c + o; and shift.
        images: [2, E, N], float32, gate g and pull p: the gradient of z is (u g + p) s.

    Returns:
        by_x: [H, W, K, N], of x's dtype, expand^T times the gradient of expand @ x.
        by_expand: [N / 128, E, K], float32, by blocks of images.
        by_shift: [E, N], float32.
        by_taps: [N / 128, E, k * k], float32.
    """
    functions, window = (ACTIVATIONS[activation], SLOPES[activation]), strip.window
    block = strip.channels
    kernel = functools.partial(_spread_gradients, window=window, functions=functions)
    (hidden, features), count, taps = weights[2].shape, x.shape[-1], window.kernel**2
    expands, parts = weights[0] is not None, count // LANES
    cut, width = grid.whole if expands else grid.maps, x.shape[-2]
    inputs = [(x, cut), (d, grid.maps), (by_y, grid.whole)]
    inputs += [*((array, grid.rows) for array in weights), (images, grid.maps)]
    outputs = [
        (jax.ShapeDtypeStruct(x.shape, x.dtype), cut),
        (_floats((parts, hidden, width)) if expands else None, grid.parts),
        (_floats((hidden, count)) if expands else None, grid.maps),
        (_floats((parts, hidden, taps)), grid.parts),
    ]
    padded, cotangent = window.phases, (side + window.margin for side in window.padded)
    # Padded, so that no tap asks where the map ends. Slopes are kept in few bits: the expansion
    # would have to be multiplied a third time for them.
    scratch = [
        ((*padded, block, LANES), jnp.float32),  # what was activated
        ((*padded, block, LANES), x.dtype) if expands else None,  # its slopes
        ((*cotangent, block, LANES), jnp.float32),  # the gradient of d
        ((window.padded[1], block, LANES), x.dtype),  # a row of gradients
        vectors.wide_shape(taps, block),
        vectors.wide_shape(5, block),
        ((taps, block, LANES), jnp.float32),
        ((*x.shape[:3], LANES), jnp.float32) if expands else None,
    ]
    expanded = math.prod(window.size) * hidden * count if expands else 0
    products = 3 * expanded * width + d.size * (features + 2 * taps)
    return grid.run(kernel, inputs, outputs, scratch, block, products, 2 * expanded + d.size)


def _spread_gradients(
    x, d, by_y, expand, taps, weights, columns, images, by_x, by_expand, by_shift, by_taps,
    padded, slopes, cotangent, gradients, wide_taps, wide, sums, total,
    *, window: Window, functions: tuple[Callable, Callable],
):  # fmt: skip
    activation, slope_of = functions

    @pl.when(pl.program_id(1) == 0)
    def _():
        vectors.clear(padded)
        vectors.clear(cotangent)

    for ref in (sums, by_expand, by_shift):
        if ref is not None:
            ref[...] = jnp.zeros_like(ref)
    vectors.widen(taps, wide_taps)
    vectors.widen(columns, wide)

    def fill(position, z):
        padded[position] = z if expand is None else activation(z)
        if expand is not None:
            slopes[position] = slope_of(z).astype(slopes.dtype)

    def back():
        for phase in range(window.stride):
            row = functools.partial(rows, phase)
            lax.fori_loop(*window.inside(0, phase), row, None)

    def rows(phase, a, _):
        for position, by_z in _input_gradient(
            cotangent, wide_taps, slopes, gradients, by_shift, phase, a, window
        ):
            if expand is None:
                by_x[position] = by_z
            else:
                total[position] += vectors.dot(expand[...], by_z, over=0)
                by_expand[...] += vectors.dot(by_z, x[position], over=1)

    vectors.each_hidden(x, expand, wide.at[4], window, fill)
    _depthwise_cotangent(d, by_y, weights, wide, images, cotangent, window.margin, slope_of)
    _taps_gradient(padded, cotangent, sums, window)
    for index in range(len(window.taps)):
        by_taps[:, pl.ds(index, 1)] = sums[index].sum(-1, keepdims=True)
    if expand is None:
        back()
    else:
        vectors.accumulate(total, by_x, back)


def _depthwise_cotangent(d, by_y, weights, wide, images, cotangent, margin, slope_of) -> None:
    """Writes the gradient of d into the padded `cotangent`."""

    def row(r, _):
        for w in range(d.shape[1]):
            value = d[r, w].astype(jnp.float32)
            gated = vectors.dot(weights[...], by_y[r, w]) * images[0] + images[1]
            by_z = gated * slope_of(vectors.affine(value, wide))
            result = by_z * wide[0] + vectors.affine(value, wide, 2)
            cotangent[r + margin, w + margin] = result

    lax.fori_loop(0, d.shape[0], row, None)


def _taps_gradient(padded, cotangent, sums, window: Window) -> None:
    """Adds each tap's products with the cotangent, [k * k, C, 128]: images stay apart."""
    margin, (rows, width) = window.margin, window.outputs

    def row(r, _):
        for index, (i, j) in enumerate(window.taps):
            for columns, channels in vectors.pieces(width, sums.shape[1]):
                part = vectors.tap(padded, r, columns, channels, i, j, window.stride)
                factor = cotangent[r + margin, vectors.shifted(columns, margin), channels]
                sums[index, channels] += (part * factor).sum(0)

    lax.fori_loop(0, rows, row, None)


def _input_gradient(cotangent, taps, slopes, gradients, by_shift, phase: int, a, window: Window):
    """Yields (position, gradient [C, 128] of what was activated there) of row a of a phase."""
    stride, margin, (top, left) = window.stride, window.margin, (pad[0] for pad in window.padding)
    for q in range(stride):
        first, last = window.inside(1, q)
        for columns, channels in vectors.pieces(last - first, taps.shape[1]):
            # The taps that fell on this phase.
            total = sum(
                cotangent[
                    a - i // stride + margin,
                    vectors.shifted(columns, first - j // stride + margin),
                    channels,
                ]
                * taps[index, channels]
                for index, (i, j) in enumerate(window.taps)
                if (i % stride, j % stride) == (phase, q)
            )
            if slopes is not None:
                total *= slopes[a, phase, vectors.shifted(columns, first), q, channels]
                by_shift[channels] += total.sum(0)
            gradients[vectors.shifted(columns, first), channels] = total.astype(gradients.dtype)
        for b in range(first, last):
            yield (stride * a + phase - top, stride * b + q - left), gradients[b]
