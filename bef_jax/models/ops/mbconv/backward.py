"""The Pallas kernels of a block's backward pass, in the order in which they are called."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from bef_jax.models.ops.activations import ACTIVATIONS, DERIVATIVES
from bef_jax.models.ops.mbconv import vectors
from bef_jax.models.ops.mbconv.grid import (
    LANES,
    Strip,
    Window,
    call_kernel,
    floats,
    maps_spec,
    parts_spec,
    weights_spec,
    whole_spec,
)


def project_gradients(
    d: Array, dy: Array, norm: Array, gate: Array, weights: Array, tile: int, activation: str
) -> tuple[Array, Array]:
    """Returns sums for the gradients of gate and norm, and the gradient of `project`'s weights.

    The symbols are z = d * factor + offset, a = activation(z), s = activation'(z), and
    u = weights @ dy, which is the gradient of the gated maps.

    Args:
        dy: [H', W', M, N], of d's dtype, the gradient of the result of `forward.project`.
        d, norm, gate, weights: as in `forward.project`.

    Returns:
        sums: [5, E, N], float32, the sums over positions of u a, u s, u s d, s and s d.
        dweights: [N / 128, E, M], float32, one sum for each tile of images.
    """
    functions = ACTIVATIONS[activation], DERIVATIVES[activation]
    kernel = functools.partial(_project_gradients, functions=functions)
    (hidden, features), images = weights.shape, d.shape[-1]
    inputs = [(d, maps_spec), (dy, whole_spec), (norm, weights_spec), (gate, maps_spec)]
    inputs.append((weights, weights_spec))
    outputs = [
        (floats((5, hidden, images)), maps_spec),
        (floats((images // LANES, hidden, features)), parts_spec),
    ]
    scratch, products = [vectors.wide_shape(2, tile)], 2 * d.size * features
    return call_kernel(kernel, inputs, outputs, scratch, tile, products, 2 * d.size)


def _project_gradients(
    d, dy, norm, gate, weights, sums, dweights, wide, *, functions: tuple[Callable, Callable]
):
    activation, slope_of = functions
    sums[...] = jnp.zeros_like(sums)
    dweights[...] = jnp.zeros_like(dweights)
    vectors.widen(norm, wide)

    def add(row, _):
        for column in range(d.shape[1]):
            dy_value, value = dy[row, column], d[row, column].astype(jnp.float32)
            z = vectors.affine(value, wide)
            activated, slope = activation(z), slope_of(z)
            u = vectors.dot(weights[...], dy_value)
            terms = u * activated, u * slope, u * slope * value
            for index, term in enumerate((*terms, slope, slope * value)):
                sums[index] += term
            gated = (activated * gate[...]).astype(d.dtype)
            dweights[...] += vectors.dot(gated, dy_value, over=1)

    lax.fori_loop(0, d.shape[0], add, None)


def expand_and_convolve_gradients(
    x: Array,
    d: Array,
    dy: Array,
    weights: tuple[Array | None, Array, Array, Array],
    gate_and_pull: Array,
    strip: Strip,
    activation: str,
) -> tuple[Array, Array | None, Array | None, Array]:
    """Returns the gradients of `forward.expand_and_convolve`, given dy.

    Args:
        x: as in `forward.expand_and_convolve`.
        d, dy: as in `project_gradients`, which also defines z, u and s.
        weights: expand [E, K]; taps [E, k * k]; the weights of `forward.project` [E, M]; and
            coefficients [E, 5], float32, which are factor, offset, c, o and shift. The gradient
            of d is (gradient of z) * factor + d * c + o.
        gate_and_pull: [2, E, N], float32, g and p. The gradient of z is (u g + p) s.

    Returns:
        dx: [H, W, K, N], of x's dtype. With `expand`, it is expand^T times the gradient of
            expand @ x. Without, dexpand and dshift are None.
        dexpand: [N / 128, E, K], float32, one sum for each tile of images.
        dshift: [E, N], float32.
        dtaps: [N / 128, E, k * k], float32, one sum for each tile of images.
    """
    functions = ACTIVATIONS[activation], DERIVATIVES[activation]
    window, tile = strip.window, strip.channels
    kernel = functools.partial(_expand_and_convolve_gradients, window=window, functions=functions)
    (hidden, features), images, taps = weights[2].shape, x.shape[-1], window.kernel**2
    expands, parts = weights[0] is not None, images // LANES
    x_spec, width = whole_spec if expands else maps_spec, x.shape[-2]
    inputs = [(x, x_spec), (d, maps_spec), (dy, whole_spec)]
    inputs += [*((array, weights_spec) for array in weights), (gate_and_pull, maps_spec)]
    outputs = [
        (jax.ShapeDtypeStruct(x.shape, x.dtype), x_spec),
        (floats((parts, hidden, width)) if expands else None, parts_spec),
        (floats((hidden, images)) if expands else None, maps_spec),
        (floats((parts, hidden, taps)), parts_spec),
    ]
    expanded = math.prod(window.size) * hidden * images if expands else 0
    products = 3 * expanded * width + d.size * (features + 2 * taps)
    scratch = _gradients_scratch(x, strip, expands)
    return call_kernel(kernel, inputs, outputs, scratch, tile, products, 2 * expanded + d.size)


def _gradients_scratch(x: Array, strip: Strip, expands: bool) -> list[tuple | None]:
    """Returns (shape, dtype) of what `_expand_and_convolve_gradients` keeps on the chip.

    Maps are padded, so that no tap has to look for the border. Slopes are kept, because otherwise
    the expansion would be computed a third time. They have x's dtype, to save memory.
    """
    window, tile = strip.window, strip.channels
    d_size, taps = (side + window.margin for side in window.padded), len(window.taps)
    return [
        ((*window.phases, tile, LANES), jnp.float32),  # the activated maps
        ((*window.phases, tile, LANES), x.dtype) if expands else None,  # slopes of the activation
        ((*d_size, tile, LANES), jnp.float32),  # the gradient of d
        ((window.padded[1], tile, LANES), x.dtype),  # a row of gradients
        vectors.wide_shape(taps, tile),
        vectors.wide_shape(5, tile),
        ((taps, tile, LANES), jnp.float32),
        ((*x.shape[:3], LANES), jnp.float32) if expands else None,
    ]


def _expand_and_convolve_gradients(
    x, d, dy, expand, taps, weights, coefficients, gate_and_pull, dx, dexpand, dshift, dtaps,
    padded, slopes, d_gradient, gradients, wide_taps, wide, sums, total,
    *, window: Window, functions: tuple[Callable, Callable],
):  # fmt: skip
    activation, slope_of = functions

    @pl.when(pl.program_id(1) == 0)
    def _():
        vectors.clear(padded)
        vectors.clear(d_gradient)

    for ref in (sums, dexpand, dshift):
        if ref is not None:
            ref[...] = jnp.zeros_like(ref)
    vectors.widen(taps, wide_taps)
    vectors.widen(coefficients, wide)

    def fill(position, z):
        padded[position] = z if expand is None else activation(z)
        if expand is not None:
            slopes[position] = slope_of(z).astype(slopes.dtype)

    def all_rows():
        for phase in range(window.stride):
            row = functools.partial(one_row, phase)
            lax.fori_loop(*window.inside(0, phase), row, None)

    def one_row(phase, a, _):
        for position, dexpanded in _input_gradient(
            d_gradient, wide_taps, slopes, gradients, dshift, phase, a, window
        ):
            if expand is None:
                dx[position] = dexpanded
            else:
                total[position] += vectors.dot(expand[...], dexpanded, over=0)
                dexpand[...] += vectors.dot(dexpanded, x[position], over=1)

    vectors.each_hidden(x, expand, wide.at[4], window, fill)
    _depthwise_gradient(d, dy, weights, wide, gate_and_pull, d_gradient, window.margin, slope_of)
    _taps_gradient(padded, d_gradient, sums, window)
    for index in range(len(window.taps)):
        dtaps[:, pl.ds(index, 1)] = sums[index].sum(-1, keepdims=True)
    if expand is None:
        all_rows()
    else:
        vectors.accumulate(total, dx, all_rows)


def _depthwise_gradient(d, dy, weights, wide, gate_and_pull, d_gradient, margin, slope_of) -> None:
    """Writes the gradient of d into `d_gradient`, after its margin of zeros."""

    def row(r, _):
        for w in range(d.shape[1]):
            value = d[r, w].astype(jnp.float32)
            gated = vectors.dot(weights[...], dy[r, w]) * gate_and_pull[0] + gate_and_pull[1]
            dz = gated * slope_of(vectors.affine(value, wide))
            result = dz * wide[0] + vectors.affine(value, wide, 2)
            d_gradient[r + margin, w + margin] = result

    lax.fori_loop(0, d.shape[0], row, None)


def _taps_gradient(padded, d_gradient, sums, window: Window) -> None:
    """Adds each tap's inputs times d_gradient to sums [k * k, C, 128], separately by image."""
    margin, (rows, width) = window.margin, window.outputs

    def row(r, _):
        for index, (i, j) in enumerate(window.taps):
            for columns, channels in vectors.pieces(width, sums.shape[1]):
                part = vectors.tap(padded, r, columns, channels, i, j, window.stride)
                factor = d_gradient[r + margin, vectors.shifted(columns, margin), channels]
                sums[index, channels] += (part * factor).sum(0)

    lax.fori_loop(0, rows, row, None)


def _input_gradient(d_gradient, taps, slopes, gradients, dshift, phase: int, a, window: Window):
    """Yields (position, gradient of x or of expand @ x, [C, 128]) for row a of a phase.

    It also writes the row into `gradients` and, with an expansion, adds it up in `dshift`.
    """
    stride, margin, (top, left) = window.stride, window.margin, (pad[0] for pad in window.padding)
    for q in range(stride):
        start, stop = window.inside(1, q)
        for columns, channels in vectors.pieces(stop - start, taps.shape[1]):
            # Sum only over the taps that read this phase.
            total = sum(
                d_gradient[
                    a - i // stride + margin,
                    vectors.shifted(columns, start - j // stride + margin),
                    channels,
                ]
                * taps[index, channels]
                for index, (i, j) in enumerate(window.taps)
                if (i % stride, j % stride) == (phase, q)
            )
            if slopes is not None:
                total *= slopes[a, phase, vectors.shifted(columns, start), q, channels]
                dshift[channels] += total.sum(0)
            gradients[vectors.shifted(columns, start), channels] = total.astype(gradients.dtype)
        for b in range(start, stop):
            yield (stride * a + phase - top, stride * b + q - left), gradients[b]
