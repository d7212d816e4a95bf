"""Operations that the kernels share, on rows, columns, taps and products of maps on the chip.

There, a position of a map is [C, 128], which is C / 8 vector registers of 8 channels and 128
images.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from bef_jax.models.ops.mbconv.grid import LANES, SUBLANES, Window

_REGISTERS = 24  # of 64, for the sums of a row's positions


def wide_shape(count: int, tile: int) -> tuple[tuple[int, ...], jnp.dtype]:
    """Returns the shape and dtype of the scratch that `widen` fills."""
    return (count, tile, LANES), jnp.float32


def each_hidden(x, expand, shift, window: Window, use: Callable) -> None:
    """Calls use(position in a padded map, expand @ x + shift [C, 128]) for all positions.

    Without `expand`, the second argument is x itself.
    """
    (top, _), (left, _) = window.padding

    def row(h, _):
        a, p = lax.div(h + top, window.stride), lax.rem(h + top, window.stride)
        for w in range(window.size[1]):
            b, q = divmod(w + left, window.stride)
            if expand is None:
                use((a, p, b, q), x[h, w].astype(jnp.float32))
            else:
                use((a, p, b, q), dot(expand[...], x[h, w]) + shift[...])

    lax.fori_loop(0, window.size[0], row, None)


def accumulate(total, result, add: Callable[[], None]) -> None:
    """Sums over the tiles of channels: `add` adds to `total`, and the last tile writes `result`."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        clear(total)

    add()

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        def copy(row, _):
            result[row] = total[row].astype(result.dtype)

        lax.fori_loop(0, len(total), copy, None)


def clear(ref) -> None:
    """Fills an array with zeros, row by row.

    The loop needs few instructions, while one assignment would need one for each register.
    """

    def row(index, _):
        ref[index] = jnp.zeros(ref.shape[1:], ref.dtype)

    lax.fori_loop(0, len(ref), row, None)


def widen(values, wide) -> None:
    """Repeats each number for all lanes, [C, n] -> [n, C, 128], once instead of at every use."""
    for index in range(len(wide)):
        wide[index] = jnp.broadcast_to(values[:, pl.ds(index, 1)], wide.shape[1:])


def affine(x: Array, wide, first: int = 0) -> Array:
    """Returns x * factor + offset per channel: wide[first] is the factor, the next the offset."""
    return x * wide[first] + wide[first + 1]


def tap(padded, row, columns, channels, i: int, j: int, stride: int) -> Array:
    """Returns the inputs that tap (i, j) reads for outputs [row, columns, channels]."""
    columns = shifted(columns, j // stride)
    return padded[row + i // stride, i % stride, columns, j % stride, channels]


def pieces(positions: int, channels: int) -> list[tuple[pl.Slice, pl.Slice]]:
    """Cuts a row into pieces (columns, channels) of 8 channels, whose sums fit into registers."""
    return [
        (pl.ds(start, min(_REGISTERS, positions - start)), pl.ds(channel, SUBLANES))
        for channel in range(0, channels, SUBLANES)
        for start in range(0, positions, _REGISTERS)
    ]


def shifted(columns: pl.Slice, offset: int) -> pl.Slice:
    """Returns the same number of columns, `offset` further right."""
    return pl.ds(columns.start + offset, columns.size)


def dot(a: Array, b: Array, over: int | None = None) -> Array:
    """Returns a @ b in float32; a^T @ b if `over` is 0, and a @ b^T if it is 1."""
    axes = {None: (1, 0), 0: (0, 0), 1: (1, 1)}[over]
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
