"""EfficientNet's block on TPU, as Pallas kernels that never write its expanded maps.

XLA puts each convolution, norm and activation of a block, forwards and backwards, through memory
one after the other: about 19 passes over maps of 6 times the block's input. Here the expansion is
multiplied again wherever it is wanted, from the narrow input, and of the wide maps the depthwise
convolution's result d alone is kept. It is written once and read four times: by `pool` and
`project`, and by each of the two kernels of the backward pass.

Maps are [H, W, C, N] (`mbconv_grid`). K, E and M are the channels of the block's input, of its
hidden maps and of its output. A block without expansion has no `expand`: x has E channels, already
activated.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from bef_jax.models import mbconv_grid as grid
from bef_jax.models.mbconv_grid import LANES, Window
from bef_jax.models.norm import ACTIVATIONS, SLOPES

_REGISTERS = 24  # of 64, that hold sums of a row's positions
_SUBLANES = 8  # channels of a register

_floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def _wide(count: int, block: int) -> tuple[tuple[int, ...], jnp.dtype]:
    """What `_widen` fills."""
    return (count, block, LANES), jnp.float32


# ---- forwards -----------------------------------------------------------------------------------


def spread(
    x: Array,
    expand: Array | None,
    shift: Array | None,
    taps: Array,
    window: Window,
    block: int,
    activation: str,
) -> tuple[Array, Array]:
    """Expansion, activation and depthwise convolution, with the sums for the norm that follows.

    Args:
        x: [H, W, K, N], floating; N a multiple of 128.
        expand: [E, K], of x's dtype.
        shift: [E, 1], float32.
        taps: [E, k * k], float32.
        block: channels at a time, from `channel_block`.

    Returns:
        d: [H', W', E, N], of x's dtype: depthwise(activation(expand @ x + shift)).
        moments: [2, E, N], float32, the sums over positions of d and of d^2.
    """
    kernel = functools.partial(_spread, window=window, activation=ACTIVATIONS[activation])
    (hidden, count), images = taps.shape, x.shape[-1]
    cut = grid.maps if expand is None else grid.whole
    inputs = [(x, cut), (expand, grid.rows), (shift, grid.rows), (taps, grid.rows)]
    result = jax.ShapeDtypeStruct((*window.outputs, hidden, images), x.dtype)
    outputs = [(result, grid.maps), (_floats((2, hidden, images)), grid.maps)]
    scratch = [((*window.phases, block, LANES), jnp.float32), _wide(count, block)]
    expanded = 0 if expand is None else math.prod(window.size) * hidden * images
    products = expanded * x.shape[-2] + result.size * count
    return grid.run(kernel, inputs, outputs, scratch, block, products, expanded)


def _spread(
    x, expand, shift, taps, d, moments, padded, wide, *, window: Window, activation: Callable
):
    @pl.when(pl.program_id(1) == 0)
    def _():
        _clear(padded)  # the margins stay so; the rest is written for each block

    moments[...] = jnp.zeros_like(moments)
    _widen(taps, wide)

    def fill(position, z):
        padded[position] = z if expand is None else activation(z)

    def convolve(row, _):
        for columns, channels in _pieces(window.outputs[1], len(taps)):
            total = sum(
                _tap(padded, row, columns, channels, i, j, window.stride) * wide[index, channels]
                for index, (i, j) in enumerate(window.taps)
            )
            d[row, columns, channels] = total.astype(d.dtype)
            moments[0, channels] += total.sum(0)
            moments[1, channels] += (total * total).sum(0)

    _expand(x, expand, shift, window, fill)
    lax.fori_loop(0, window.outputs[0], convolve, None)


def pool(d: Array, norm: Array, block: int, activation: str) -> Array:
    """The sums over positions of activation(d * norm[0] + norm[1]), [E, N], float32.

    Args:
        d: [H', W', E, N], from `spread`.
        norm: [E, 2], float32, factor and offset.
    """
    kernel = functools.partial(_pool, activation=ACTIVATIONS[activation])
    inputs, outputs = [(d, grid.maps), (norm, grid.rows)], [(_floats(d.shape[2:]), grid.maps)]
    return grid.run(kernel, inputs, outputs, [_wide(2, block)], block, d.size, d.size)[0]


def _pool(d, norm, pooled, wide, *, activation: Callable):
    pooled[...] = jnp.zeros_like(pooled)
    _widen(norm, wide)

    def add(row, _):
        for column in range(d.shape[1]):
            pooled[...] += activation(_affine(d[row, column].astype(jnp.float32), wide))

    lax.fori_loop(0, d.shape[0], add, None)


def project(
    d: Array, norm: Array, gate: Array, weights: Array, block: int, activation: str
) -> Array:
    """weights^T @ (activation(d * norm[0] + norm[1]) * gate), [H', W', M, N], of d's dtype.

    Args:
        d, norm: as in `pool`.
        gate: [E, N], float32.
        weights: [E, M], of d's dtype.
    """
    kernel = functools.partial(_project, activation=ACTIVATIONS[activation])
    shape = (*d.shape[:2], weights.shape[1], d.shape[3])
    inputs = [(d, grid.maps), (norm, grid.rows), (gate, grid.maps), (weights, grid.rows)]
    outputs = [(jax.ShapeDtypeStruct(shape, d.dtype), grid.whole)]
    scratch = [((*shape[:3], LANES), jnp.float32), _wide(2, block)]
    products = d.size * weights.shape[1]
    return grid.run(kernel, inputs, outputs, scratch, block, products, d.size)[0]


def _project(d, norm, gate, weights, y, total, wide, *, activation: Callable):
    _widen(norm, wide)

    def add(row, _):
        for column in range(d.shape[1]):
            value = d[row, column].astype(jnp.float32)
            gated = activation(_affine(value, wide)) * gate[...]
            total[row, column] += _dot(weights[...], gated.astype(d.dtype), over=0)

    _accumulate(total, y, lambda: lax.fori_loop(0, d.shape[0], add, None))


# ---- backwards ----------------------------------------------------------------------------------


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
    outputs = [
        (_floats((5, hidden, images)), grid.maps),
        (_floats((images // LANES, hidden, features)), grid.parts),
    ]
    inputs.append((weights, grid.rows))
    scratch, products = [_wide(2, block)], 2 * d.size * features
    return grid.run(kernel, inputs, outputs, scratch, block, products, 2 * d.size)


def _project_gradients(
    d, by_y, norm, gate, weights, sums, by_weights, wide, *, functions: tuple[Callable, Callable]
):
    activation, slope_of = functions
    sums[...] = jnp.zeros_like(sums)
    by_weights[...] = jnp.zeros_like(by_weights)
    _widen(norm, wide)

    def add(row, _):
        for column in range(d.shape[1]):
            cotangent, value = by_y[row, column], d[row, column].astype(jnp.float32)
            z = _affine(value, wide)
            activated, slope = activation(z), slope_of(z)
            upstream = _dot(weights[...], cotangent)
            terms = upstream * activated, upstream * slope, upstream * slope * value
            for index, term in enumerate((*terms, slope, slope * value)):
                sums[index] += term
            by_weights[...] += _dot((activated * gate[...]).astype(d.dtype), cotangent, over=1)

    lax.fori_loop(0, d.shape[0], add, None)


def spread_gradients(
    x: Array,
    d: Array,
    by_y: Array,
    weights: tuple[Array | None, Array, Array, Array],
    images: Array,
    window: Window,
    block: int,
    activation: str,
) -> tuple[Array, Array | None, Array | None, Array]:
    """The gradients of `spread`, from that of what `project` gives.

    Args:
        x, d, by_y: as above.
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
    functions = ACTIVATIONS[activation], SLOPES[activation]
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
    scratch = [
        ((*padded, block, LANES), jnp.float32),
        ((*padded, block, LANES), x.dtype) if expands else None,
        ((*cotangent, block, LANES), jnp.float32),
        ((window.padded[1], block, LANES), x.dtype),
        _wide(taps, block),
        _wide(5, block),
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
        _clear(padded)
        _clear(cotangent)

    for ref in (sums, by_expand, by_shift):
        if ref is not None:
            ref[...] = jnp.zeros_like(ref)
    _widen(taps, wide_taps)
    _widen(columns, wide)

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
                total[position] += _dot(expand[...], by_z, over=0)
                by_expand[...] += _dot(by_z, x[position], over=1)

    _expand(x, expand, wide.at[4], window, fill)
    _depthwise_cotangent(d, by_y, weights, wide, images, cotangent, window.margin, slope_of)
    _taps_gradient(padded, cotangent, sums, window)
    for index in range(len(window.taps)):
        by_taps[:, pl.ds(index, 1)] = sums[index].sum(-1, keepdims=True)
    if expand is None:
        back()
    else:
        _accumulate(total, by_x, back)


def _depthwise_cotangent(d, by_y, weights, wide, images, cotangent, margin, slope_of) -> None:
    """Writes the gradient of d into the padded `cotangent`."""

    def row(r, _):
        for w in range(d.shape[1]):
            value = d[r, w].astype(jnp.float32)
            gated = _dot(weights[...], by_y[r, w]) * images[0] + images[1]
            by_z = gated * slope_of(_affine(value, wide))
            result = by_z * wide[0] + _affine(value, wide, 2)
            cotangent[r + margin, w + margin] = result

    lax.fori_loop(0, d.shape[0], row, None)


def _taps_gradient(padded, cotangent, sums, window: Window) -> None:
    """Adds each tap's products with the cotangent, [k * k, C, 128]: images stay apart."""
    margin, (rows, width) = window.margin, window.outputs

    def row(r, _):
        for index, (i, j) in enumerate(window.taps):
            for columns, channels in _pieces(width, sums.shape[1]):
                part = _tap(padded, r, columns, channels, i, j, window.stride)
                factor = cotangent[r + margin, _shifted(columns, margin), channels]
                sums[index, channels] += (part * factor).sum(0)

    lax.fori_loop(0, rows, row, None)


def _input_gradient(cotangent, taps, slopes, gradients, by_shift, phase: int, a, window: Window):
    """Yields (position, gradient [C, 128] of what was activated there) of row a of a phase."""
    stride, margin, (top, left) = window.stride, window.margin, (pad[0] for pad in window.padding)
    for q in range(stride):
        first, last = window.inside(1, q)
        for columns, channels in _pieces(last - first, taps.shape[1]):
            # The taps that fell on this phase.
            total = sum(
                cotangent[
                    a - i // stride + margin,
                    _shifted(columns, first - j // stride + margin),
                    channels,
                ]
                * taps[index, channels]
                for index, (i, j) in enumerate(window.taps)
                if (i % stride, j % stride) == (phase, q)
            )
            if slopes is not None:
                total *= slopes[a, phase, _shifted(columns, first), q, channels]
                by_shift[channels] += total.sum(0)
            gradients[_shifted(columns, first), channels] = total.astype(gradients.dtype)
        for b in range(first, last):
            yield (stride * a + phase - top, stride * b + q - left), gradients[b]


# ---- both ways ----------------------------------------------------------------------------------


def _expand(x, expand, shift, window: Window, use: Callable) -> None:
    """Calls use(position in a padded map, expand @ x + shift [C, 128]) for all positions."""
    (top, _), (left, _) = window.padding

    def row(h, _):
        a, p = lax.div(h + top, window.stride), lax.rem(h + top, window.stride)
        for w in range(window.size[1]):
            b, q = divmod(w + left, window.stride)
            if expand is None:
                use((a, p, b, q), x[h, w].astype(jnp.float32))
            else:
                use((a, p, b, q), _dot(expand[...], x[h, w]) + shift[...])

    lax.fori_loop(0, window.size[0], row, None)


def _accumulate(total, result, add: Callable[[], None]) -> None:
    """Sums over the blocks of channels: `add` adds to `total`, and the last one's is the result."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        _clear(total)

    add()

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        def copy(row, _):
            result[row] = total[row].astype(result.dtype)

        lax.fori_loop(0, len(total), copy, None)


def _clear(ref) -> None:
    """Zeros, by rows: a loop, where one assignment would be as many instructions as registers."""

    def row(index, _):
        ref[index] = jnp.zeros(ref.shape[1:], ref.dtype)

    lax.fori_loop(0, len(ref), row, None)


def _widen(columns, wide) -> None:
    """[C, n] -> [n, C, 128]: each number for all lanes, once, not wherever it is wanted."""
    for index in range(len(wide)):
        wide[index] = jnp.broadcast_to(columns[:, pl.ds(index, 1)], wide.shape[1:])


def _affine(x: Array, wide, first: int = 0) -> Array:
    """By channel x * factor + offset, two of the widened columns."""
    return x * wide[first] + wide[first + 1]


def _tap(padded, row, columns, channels, i: int, j: int, stride: int) -> Array:
    """What tap (i, j) reads for outputs [row, columns, channels]."""
    columns = _shifted(columns, j // stride)
    return padded[row + i // stride, i % stride, columns, j % stride, channels]


def _pieces(positions: int, channels: int) -> list[tuple[pl.Slice, pl.Slice]]:
    """(columns, channels) of pieces of a row, of 8 channels, whose sums fit into registers."""
    return [
        (pl.ds(start, min(_REGISTERS, positions - start)), pl.ds(channel, _SUBLANES))
        for channel in range(0, channels, _SUBLANES)
        for start in range(0, positions, _REGISTERS)
    ]


def _shifted(columns: pl.Slice, offset: int) -> pl.Slice:
    return pl.ds(columns.start + offset, columns.size)


def _dot(a: Array, b: Array, over: int | None = None) -> Array:
    """The product a @ b in float32; over 0: a^T @ b, over 1: a @ b^T."""
    axes = {None: (1, 0), 0: (0, 0), 1: (1, 1)}[over]
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
