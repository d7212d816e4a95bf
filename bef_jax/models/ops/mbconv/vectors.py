"""What the kernels have in common: rows, columns, taps and products of maps on the chip.

A map's position is [C, 128] there: C / 8 vector registers of 8 channels and 128 images.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from bef_jax.models.ops.mbconv.grid import LANES, Window

_REGISTERS = 24  # of 64, that hold sums of a row's positions
_SUBLANES = 8  # channels of a register


def wide_shape(count: int, tile: int) -> tuple[tuple[int, ...], jnp.dtype]:
    """Shape and dtype of the scratch that `widen` fills."""
    return (count, tile, LANES), jnp.float32


def each_hidden(x, expand, shift, window: Window, use: Callable) -> None:
    """Calls use(position in a padded map, expand @ x + shift [C, 128]) for all positions.

    Without `expand` it is x itself.
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
    """Sums over the tiles of channels: `add` adds to `total`, and the last one's is the result."""

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
    """Zeros, by rows: a loop, where one assignment would be as many instructions as registers."""

    def row(index, _):
        ref[index] = jnp.zeros(ref.shape[1:], ref.dtype)

    lax.fori_loop(0, len(ref), row, None)


def widen(columns, wide) -> None:
    """[C, n] -> [n, C, 128]: each number for all lanes, once, not wherever it is wanted."""
    for index in range(len(wide)):
        wide[index] = jnp.broadcast_to(columns[:, pl.ds(index, 1)], wide.shape[1:])


def affine(x: Array, wide, first: int = 0) -> Array:
    """By channel x * factor + offset, two of the widened columns."""
    return x * wide[first] + wide[first + 1]


def tap(padded, row, columns, channels, i: int, j: int, stride: int) -> Array:
    """What tap (i, j) reads for outputs [row, columns, channels]."""
    columns = shifted(columns, j // stride)
    return padded[row + i // stride, i % stride, columns, j % stride, channels]


def pieces(positions: int, channels: int) -> list[tuple[pl.Slice, pl.Slice]]:
    """(columns, channels) of pieces of a row, of 8 channels, whose sums fit into registers."""
    return [
        (pl.ds(start, min(_REGISTERS, positions - start)), pl.ds(channel, _SUBLANES))
        for channel in range(0, channels, _SUBLANES)
        for start in range(0, positions, _REGISTERS)
    ]


def shifted(columns: pl.Slice, offset: int) -> pl.Slice:
    """As many columns, so many further right."""
    return pl.ds(columns.start + offset, columns.size)


def dot(a: Array, b: Array, over: int | None = None) -> Array:
    """The product a @ b in float32; over 0: a^T @ b, over 1: a @ b^T."""
    axes = {None: (1, 0), 0: (0, 0), 1: (1, 1)}[over]
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
