"""EfficientNet's block on TPU, as three Pallas kernels that never write its expanded maps.

XLA puts each convolution, norm and activation of a block, forwards and backwards, through memory
one after the other: about 19 passes over maps of 6 times the block's input. Here the expansion is
multiplied again wherever it is wanted, from the narrow input, and of the wide maps the depthwise
convolution's result alone is kept: written once, and read once by each of two kernels backwards.

Maps are [H, W, C, N] here: channels along a vector register's sublanes, images along its lanes. So
the taps of a depthwise convolution are other registers, not shifted ones, and no channel is padded.
A kernel runs over blocks of 128 images and of some of the E channels; a block's maps stay on chip.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bef_jax.models.depthwise import Padding
from bef_jax.models.norm import ACTIVATIONS, SLOPES

LANES = 128  # images of a block
_SUBLANES = 16  # of bfloat16; a block's channels are a multiple of them
_MOST_CHANNELS = 96  # of a block
_VMEM = 100 * 2**20  # of the 128 MiB on v5e and v6e; XLA keeps the rest
_REGISTERS = 24  # of 64, that hold the sums of one row's positions


@dataclasses.dataclass(frozen=True)
class Window:
    """The geometry of a depthwise convolution.

    A map that it reads is kept padded and split into its phases, [A, stride, B, stride, C, N]:
    padded position (stride * a + p, stride * b + q) is element [a, p, b, q]. So a row of taps is
    consecutive at stride 2, too.
    """

    size: tuple[int, int]
    kernel: int
    stride: int
    padding: Padding

    @property
    def outputs(self) -> tuple[int, int]:
        """H', W'."""
        sides = zip(self.size, self.padding, strict=True)
        height, width = ((n + sum(pad) - self.kernel) // self.stride + 1 for n, pad in sides)
        return height, width

    @property
    def margin(self) -> int:
        """Zeros before a padded cotangent: how far a tap reaches within its phase."""
        return (self.kernel - 1) // self.stride

    @property
    def padded(self) -> tuple[int, int]:
        """A, B: as many as inputs or taps reach."""
        sides = zip(self.size, self.padding, self.outputs, strict=True)
        a, b = (max((n + pad[0] - 1) // self.stride + 1, m + self.margin) for n, pad, m in sides)
        return a, b

    @property
    def phases(self) -> tuple[int, int, int, int]:
        """The shape of a padded map, without its channels and images."""
        return self.padded[0], self.stride, self.padded[1], self.stride

    @property
    def taps(self) -> list[tuple[int, int]]:
        """All (i, j), in the order in which a kernel's taps lie."""
        return [(i, j) for i in range(self.kernel) for j in range(self.kernel)]

    def inside(self, axis: int, phase: int) -> tuple[int, int]:
        """The elements of a phase along an axis that are inputs, not padding: [first, last)."""
        before = self.padding[axis][0] - phase
        return -(-before // self.stride), (before + self.size[axis] - 1) // self.stride + 1


def channel_block(window: Window, inputs: int, hidden: int, outputs: int, itemsize: int) -> int:
    """How many of a block's channels the kernels take at a time; 0 where none fit on the chip.

    Args:
        inputs, hidden, outputs: K, E and M.
        itemsize: bytes of the activations' dtype.
    """
    positions, results = math.prod(window.size), math.prod(window.outputs)
    cotangents = math.prod(side + window.margin for side in window.padded)
    # What `spread_gradients` holds, the largest: whole maps once, and of a block's channels the
    # padded maps once, what is loaded while the last block runs twice.
    whole = positions * inputs * (itemsize + 4) + results * outputs * itemsize
    each = math.prod(window.phases) * (4 + itemsize) + cotangents * 4 + results * 2 * itemsize
    each += window.kernel**2 * 4 + 64
    most = min(_MOST_CHANNELS, (_VMEM // LANES - whole) // each)
    blocks = range(_SUBLANES, most + 1, _SUBLANES)
    return max((block for block in blocks if hidden % block == 0), default=0)


# ---- what the block calls -----------------------------------------------------------------------


def spread(
    x: Array, expand: Array, shift: Array, taps: Array, window: Window, block: int, activation: str
) -> tuple[Array, Array]:
    """Expansion, activation and depthwise convolution, with the sums for the norm that follows.

    Args:
        x: [H, W, K, N], floating; N a multiple of 128.
        expand: [E, K], of x's dtype.
        shift: [E, 1], float32.
        taps: [k * k, E, 1], float32.
        block: from `channel_block`.

    Returns:
        d: [H', W', E, N], of x's dtype: depthwise(activation(expand @ x + shift)).
        moments: [2, E, N], float32, the sums over positions of d and of d^2.
    """
    kernel = functools.partial(_spread, window=window, activation=ACTIVATIONS[activation])
    hidden, images = len(expand), x.shape[-1]
    inputs = [(x, _whole), (expand, _rows), (shift, _rows), (taps, _rows)]
    outputs = [
        (jax.ShapeDtypeStruct((*window.outputs, hidden, images), x.dtype), _maps),
        (jax.ShapeDtypeStruct((2, hidden, images), jnp.float32), _maps),
    ]
    products = x.size * hidden + math.prod(window.outputs) * hidden * images * len(taps)
    padded = [((*window.phases, block, LANES), jnp.float32)]
    return _run(kernel, inputs, outputs, padded, block, products)


def project_gradients(
    d: Array, by_y: Array, project: Array, norm: Array, gate: Array, block: int, activation: str
) -> tuple[Array, Array]:
    """What the gradients of squeeze-excite, of its norm and of the projection sum over positions.

    With u = project @ by_y, the gradient of the gated maps, a = activation(z) and its slope s, at z
    = norm[0] * d + norm[1].

    Args:
        d: [H', W', E, N], from `spread`.
        by_y: [H', W', M, N], of d's dtype, the gradient of the projection.
        project: [E, M], of d's dtype.
        norm: [2, E, 1], float32.
        gate: [E, N], float32.

    Returns:
        sums: [5, E, N], float32, the sums over positions of u a, u s, u s d, s and s d.
        by_project: [N / 128, E, M], float32, its gradient by images.
    """
    functions = ACTIVATIONS[activation], SLOPES[activation]
    kernel = functools.partial(_project_gradients, functions=functions)
    hidden, images, features = d.shape[-2], d.shape[-1], project.shape[1]
    inputs = [(d, _maps), (by_y, _whole), (project, _rows), (norm, _rows), (gate, _maps)]
    outputs = [
        (jax.ShapeDtypeStruct((5, hidden, images), jnp.float32), _maps),
        (jax.ShapeDtypeStruct((images // LANES, hidden, features), jnp.float32), _parts),
    ]
    return _run(kernel, inputs, outputs, [], block, 2 * d.size * features)


def spread_gradients(
    x: Array,
    d: Array,
    by_y: Array,
    weights: Sequence[Array],
    images: Array,
    window: Window,
    block: int,
    activation: str,
) -> tuple[Array, Array, Array, Array]:
    """The gradients of `spread`, from that of the projection.

    Args:
        x, d, by_y: as above.
        weights: expand [E, K], taps [k * k, E, 1], project [E, M] and columns [5, E, 1], float32:
            shift; factor and offset of the norm behind d; and factor and offset of d in its
            gradient, which is columns[1] * (gradient of z) + columns[3] * d + columns[4].
        images: [2, E, N], float32, gate g and pull p: the gradient of z is (u g + p) s.

    Returns:
        by_x: [H, W, K, N], float32, expand^T times the gradient of expand @ x.
        by_expand: [N / 128, E, K], by_shift [E, N], by_taps [N / 128, k * k, E, 1], float32.
    """
    functions = ACTIVATIONS[activation], SLOPES[activation]
    kernel = functools.partial(_spread_gradients, window=window, functions=functions)
    (hidden, width), count, taps = weights[0].shape, x.shape[-1], window.kernel**2
    inputs = [(x, _whole), (d, _maps), (by_y, _whole), *((array, _rows) for array in weights)]
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = [
        (shape(x.shape), _whole),
        (shape((count // LANES, hidden, width)), _parts),
        (shape((hidden, count)), _maps),
        (shape((count // LANES, taps, hidden, 1)), _parts),
    ]
    phases, upstream = window.phases, (side + window.margin for side in window.padded)
    scratch = [
        ((*phases, block, LANES), jnp.float32),
        ((*phases, block, LANES), x.dtype),
        ((*upstream, block, LANES), jnp.float32),
        ((taps, block, LANES), jnp.float32),
    ]
    products = 3 * x.size * hidden + d.size * (by_y.shape[-2] + 2 * taps)
    return _run(kernel, [*inputs, (images, _maps)], outputs, scratch, block, products)


def _run(kernel: Callable, inputs, outputs, scratch, block: int, products: int):
    """Calls a kernel for every block: of images, and within them of channels.

    Args:
        inputs, outputs: (array, or its shape; how it is cut into blocks).
        scratch: shapes and dtypes of what a block keeps on the chip.
        products: multiplications, each with an addition, for XLA's account of costs.
    """
    arrays, shapes = [array for array, _ in inputs], [shape for shape, _ in outputs]
    (hidden, images), (maps, _) = shapes[0].shape[-2:], inputs[0]
    hidden = next(array.shape[-2] for array, cut in (*inputs, *outputs) if cut is _maps)
    images = maps.shape[-1]
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in (*arrays, *shapes))
    call = functools.partial(
        pl.pallas_call,
        kernel,
        out_shape=shapes,
        grid=(images // LANES, hidden // block),
        in_specs=[cut(array.shape, block) for array, cut in inputs],
        out_specs=[cut(shape.shape, block) for shape, cut in outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=2 * products, bytes_accessed=moved, transcendentals=0),
    )
    # Interpreted elsewhere: the same arithmetic, slowly, for tests.
    return lax.platform_dependent(
        *arrays, tpu=lambda *args: call()(*args), default=lambda *args: call(interpret=True)(*args)
    )


def _whole(shape: Sequence[int], block: int) -> pl.BlockSpec:
    """Maps [H, W, C, N] of few channels: all of them stay on the chip for all blocks of images'."""
    # One buffer, not two: the next images' are loaded when these are done.
    return pl.BlockSpec(
        (*shape[:-1], LANES), lambda n, e: (0, 0, 0, n), pipeline_mode=pl.Buffered(1)
    )


def _maps(shape: Sequence[int], block: int) -> pl.BlockSpec:
    """[..., E, N]."""
    rest = len(shape) - 2
    return pl.BlockSpec((*shape[:-2], block, LANES), lambda n, e: (*(0,) * rest, e, n))


def _rows(shape: Sequence[int], block: int) -> pl.BlockSpec:
    """[..., E, K], for all images."""
    rest = len(shape) - 2
    return pl.BlockSpec((*shape[:-2], block, shape[-1]), lambda n, e: (*(0,) * rest, e, 0))


def _parts(shape: Sequence[int], block: int) -> pl.BlockSpec:
    """[N / 128, ..., E, K]: what each block of images adds."""
    rest = len(shape) - 3
    size = (None, *shape[1:-2], block, shape[-1])
    return pl.BlockSpec(size, lambda n, e: (n, *(0,) * rest, e, 0))


# ---- the kernels --------------------------------------------------------------------------------


def _spread(x, expand, shift, taps, d, moments, padded, *, window: Window, activation: Callable):
    @pl.when(pl.program_id(1) == 0)
    def _():
        padded[...] = jnp.zeros_like(padded)  # the margins stay so; the rest is written each time

    moments[...] = jnp.zeros_like(moments)

    def fill(position, z):
        padded[position] = activation(z)

    def convolve(row, _):
        for start, count in _pieces(window.outputs[1], len(expand)):
            taken = (_tap(padded, row, start, count, i, j, window.stride) for i, j in window.taps)
            total = sum(part * taps[index] for index, part in enumerate(taken))
            d[row, pl.ds(start, count)] = total.astype(d.dtype)
            moments[0] += total.sum(0)
            moments[1] += (total * total).sum(0)

    _expand(x, expand, shift, window, fill)
    lax.fori_loop(0, window.outputs[0], convolve, None)


def _project_gradients(
    d, by_y, project, norm, gate, sums, by_project, *, functions: tuple[Callable, Callable]
):
    activation, slope_of = functions
    sums[...] = jnp.zeros_like(sums)
    by_project[...] = jnp.zeros_like(by_project)

    def add(row, _):
        for column in range(d.shape[1]):
            cotangent, value = by_y[row, column], d[row, column].astype(jnp.float32)
            z = value * norm[0] + norm[1]
            activated, slope = activation(z), slope_of(z)
            upstream = _dot(project[...], cotangent)
            terms = upstream * activated, upstream * slope, upstream * slope * value
            for index, term in enumerate((*terms, slope, slope * value)):
                sums[index] += term
            by_project[...] += _dot((activated * gate[...]).astype(d.dtype), cotangent, over=1)

    lax.fori_loop(0, d.shape[0], add, None)


def _spread_gradients(
    x, d, by_y, expand, taps, project, columns, images, by_x, by_expand, by_shift, by_taps,
    padded, slopes, upstream, sums, *, window: Window, functions: tuple[Callable, Callable],
):  # fmt: skip
    activation, slope_of = functions

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in (padded, upstream, by_x):
            ref[...] = jnp.zeros_like(ref)

    for ref in (sums, by_expand, by_shift):
        ref[...] = jnp.zeros_like(ref)

    def fill(position, z):
        padded[position] = activation(z)
        slopes[position] = slope_of(z).astype(slopes.dtype)

    _expand(x, expand, columns.at[0], window, fill)
    _depthwise_cotangent(d, by_y, project, columns, images, upstream, window.margin, slope_of)
    _taps_gradient(padded, upstream, sums, window)
    by_taps[...] = sums[...].sum(-1, keepdims=True)
    for phase in range(window.stride):
        back = functools.partial(
            _row_gradient, phase, x, expand, taps, slopes, upstream, by_x, by_expand, by_shift,
            window=window,
        )  # fmt: skip
        lax.fori_loop(*window.inside(0, phase), back, None)


def _expand(x, expand, shift, window: Window, use: Callable) -> None:
    """Calls use(position in a padded map, expand @ x + shift [C, 128]) for all positions."""
    (top, _), (left, _) = window.padding

    def row(h, _):
        a, p = lax.div(h + top, window.stride), lax.rem(h + top, window.stride)
        for w in range(window.size[1]):
            b, q = divmod(w + left, window.stride)
            use((a, p, b, q), _dot(expand[...], x[h, w]) + shift[...])

    lax.fori_loop(0, window.size[0], row, None)


def _depthwise_cotangent(d, by_y, project, columns, images, upstream, margin, slope_of) -> None:
    """Writes the gradient of d into the padded `upstream`."""

    def row(r, _):
        for w in range(d.shape[1]):
            value = d[r, w].astype(jnp.float32)
            gated = _dot(project[...], by_y[r, w]) * images[0] + images[1]
            by_z = gated * slope_of(value * columns[1] + columns[2])
            total = by_z * columns[1] + value * columns[3] + columns[4]
            upstream[r + margin, w + margin] = total

    lax.fori_loop(0, d.shape[0], row, None)


def _taps_gradient(padded, upstream, sums, window: Window) -> None:
    """Adds each tap's products with the cotangent, [k * k, C, 128]: images stay apart."""
    margin, (rows, width) = window.margin, window.outputs

    def row(r, _):
        for index, (i, j) in enumerate(window.taps):
            for start, count in _pieces(width, sums.shape[1]):
                part = _tap(padded, r, start, count, i, j, window.stride)
                cotangent = upstream[r + margin, pl.ds(start + margin, count)]
                sums[index] += (part * cotangent).sum(0)

    lax.fori_loop(0, rows, row, None)


def _row_gradient(
    phase, x, expand, taps, slopes, upstream, by_x, by_expand, by_shift, a, _, *, window: Window
) -> None:
    """Row a of a phase: the taps that fell on its inputs, and from there to the block's input."""
    stride, margin, (top, left) = window.stride, window.margin, (pad[0] for pad in window.padding)
    for q in range(stride):
        first, last = window.inside(1, q)
        for start, count in _pieces(last - first, len(expand)):
            b = first + start
            total = sum(
                upstream[a - i // stride + margin, pl.ds(b - j // stride + margin, count)]
                * taps[index]
                for index, (i, j) in enumerate(window.taps)
                if (i % stride, j % stride) == (phase, q)
            )
            total *= slopes[a, phase, pl.ds(b, count), q]
            by_shift[...] += total.sum(0)
            for offset in range(count):
                position = stride * a + phase - top, stride * (b + offset) + q - left
                by_z = total[offset].astype(x.dtype)
                by_x[position] += _dot(expand[...], by_z, over=0)
                by_expand[...] += _dot(by_z, x[position], over=1)


def _tap(padded, row, start: int, count: int, i: int, j: int, stride: int) -> Array:
    """What tap (i, j) reads for outputs [row, start : start + count]."""
    return padded[row + i // stride, i % stride, pl.ds(start + j // stride, count), j % stride]


def _pieces(positions: int, channels: int) -> list[tuple[int, int]]:
    """(start, count) of pieces of a row whose sums fit into registers, each of 8 x 128 numbers."""
    count = max(1, _REGISTERS * 8 // channels)
    return [(start, min(count, positions - start)) for start in range(0, positions, count)]


def _dot(a: Array, b: Array, over: int | None = None) -> Array:
    """The product a @ b in float32; over 0: a^T @ b, over 1: a @ b^T."""
    axes = {None: (1, 0), 0: (0, 0), 1: (1, 1)}[over]
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
