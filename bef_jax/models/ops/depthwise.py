"""Depthwise convolution, in the form that each platform runs fastest.

XLA's grouped convolution is 15 to 25 times slower on CPU than multiplying shifted views of the
input and adding them up, and the gradient that JAX derives for the latter costs 20 times its
forward pass. So CPU gets that form with a gradient of its own; GPU and TPU get the native
convolution. Lowering decides (`jax.lax.platform_dependent`): the caller never does.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)

_GROUP = 8  # images added up elementwise before positions are: 16 is slower on small maps


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise_conv(
    x: Array, kernel: Array, stride: int, padding: Padding, form: str = "auto"
) -> Array:
    """Convolves every channel with its own kernel (a correlation, as everywhere in the field).

    Args:
        x: [N, H, W, C], floating.
        kernel: [k, k, 1, C] of the same dtype, as Linen's `Conv(feature_group_count=C)` keeps it.
        stride: 1 or 2, along height and width; at most k.
        padding: zeros added before and after height and width, fewer than k on each side.
        form: auto (by platform), native (XLA's convolution) or shift (shift, multiply, add).

    Returns:
        [N, H', W', C] with H' = (H + top + bottom - k) // stride + 1, of x's dtype.
    """
    shifted = functools.partial(_shifted, stride=stride, padding=padding)
    native = functools.partial(_native, stride=stride, padding=padding)
    return _lower(form, shifted, native)(x, kernel)


def _forward(x: Array, kernel: Array, stride: int, padding: Padding, form: str):
    return depthwise_conv(x, kernel, stride, padding, form), (x, kernel)


def _backward(stride: int, padding: Padding, form: str, residuals, g: Array):
    shifted = functools.partial(_shifted_gradients, stride=stride, padding=padding)
    native = functools.partial(_native_gradients, stride=stride, padding=padding)
    return _lower(form, shifted, native)(*residuals, g)


def _lower(form: str, shifted: Callable, native: Callable) -> Callable:
    by_platform = functools.partial(lax.platform_dependent, cpu=shifted, default=native)
    return {"auto": by_platform, "shift": shifted, "native": native}[form]


depthwise_conv.defvjp(_forward, _backward)


# ---- the platform's own convolution -------------------------------------------------------------


def _native(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _native_gradients(x: Array, kernel: Array, g: Array, stride: int, padding: Padding):
    # The convolution itself, which nobody takes here, is left out by XLA.
    _, pullback = jax.vjp(lambda x, kernel: _native(x, kernel, stride, padding), x, kernel)
    return pullback(g)


# ---- shift, multiply, add -----------------------------------------------------------------------


def _shifted(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    k = kernel.shape[0]
    phases = lax.optimization_barrier(_padded_phases(x, stride, padding))
    taps = _taps(phases, _output_size(x, k, stride, padding))
    # k * k views of the phases, each [N, H', W', C].
    return sum(taps(i, j) * kernel[i, j, 0] for i in range(k) for j in range(k))


def _output_size(x: Array, k: int, stride: int, padding: Padding) -> tuple[int, int]:
    sides = zip(x.shape[1:3], padding, strict=True)
    height, width = ((side + sum(pad) - k) // stride + 1 for side, pad in sides)
    return height, width


def _padded_phases(x: Array, stride: int, padding: Padding) -> list[list[Array]]:
    """The padded input, split into its stride * stride phases.

    The caller puts it behind a barrier: XLA would otherwise fuse the padding into every tap, and
    test each element for the border instead of loading vectors; a strided load is as bad.
    """
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return [[padded[:, p::stride, q::stride] for q in range(stride)] for p in range(stride)]


def _taps(phases: list[list[Array]], size: tuple[int, int]) -> Callable[[int, int], Array]:
    """Returns `tap(i, j)`: what kernel position (i, j) multiplies, [N, *size, C]."""
    stride = len(phases)
    return lambda i, j: _crop(phases[i % stride][j % stride], (i // stride, j // stride), size)


def _crop(x: Array, corner: Sequence[int], size: tuple[int, int]) -> Array:
    (top, left), (height, width) = corner, size
    return x[:, top : top + height, left : left + width]


def _shifted_gradients(x: Array, kernel: Array, g: Array, stride: int, padding: Padding):
    """Returns dx and dkernel, given g, the gradient of the output.

    Both read one padded g: what is padded is kept in memory.

    XLA fuses anything else that is elementwise into every tap, and would compute the gradient that
    comes from above, batch normalisation's and SiLU's, k * k times.
    """
    k, sides = kernel.shape[0], x.shape[1:3]
    spans = [_span(k, stride, side, pad) for side, pad in zip(sides, padding, strict=True)]
    corner, size = [span.before for span in spans], g.shape[1:3]
    padded = jnp.pad(g, ((0, 0), *((span.before, span.after) for span in spans), (0, 0)))
    phases = _padded_phases(x, stride, padding)
    # In one barrier: one like the forward pass's would be merged with it, and then every tap, with
    # two users, would be copied out.
    phases, padded = lax.optimization_barrier((phases, padded))
    dx = _input_gradient(padded, kernel, stride, spans)
    return dx, _kernel_gradient(phases, kernel, _crop(padded, corner, size))


@dataclasses.dataclass(frozen=True)
class _Span:
    """Along height or width: what of the padded input's gradient is wanted, and from what.

    Position stride * a + phase of the padded input got tap stride * i + phase of output a - i.
    """

    before: int  # zeros before g
    after: int  # zeros after it
    length: int  # positions a of every phase
    start: int  # where the input begins in the phases put together
    side: int  # of the input


def _span(k: int, stride: int, side: int, pad: tuple[int, int]) -> _Span:
    outputs = (side + sum(pad) - k) // stride + 1
    first, last = pad[0] // stride, (pad[0] + side - 1) // stride  # a of the input's ends
    start = pad[0] - stride * first
    before = -(-k // stride) - 1 - first
    return _Span(before, max(last - outputs + 1, 0), last - first + 1, start, side)


def _input_gradient(padded: Array, kernel: Array, stride: int, spans: list[_Span]) -> Array:
    """Each phase of the input gets the taps that fell on it: a correlation of its own.

    Dilating g with zeros instead would multiply stride^2 times as much, mostly by zero.
    All phases are one loop over [N, a, phase, b, phase, C], a broadcast of g: put
    together from stride^2 arrays, every element would look up which one it comes from.
    """
    k, channels = kernel.shape[0], kernel.shape[-1]
    reach = -(-k // stride)  # taps of the phase that has most
    # [i, phase, j, phase, C], with zeros where a phase has a tap less.
    rest = (0, reach * stride - k)
    taps = jnp.pad(kernel[:, :, 0], (rest, rest, (0, 0)))
    taps = taps.reshape(reach, stride, reach, stride, channels)
    size = tuple(span.length for span in spans)
    whole = sum(
        _crop(padded, (reach - 1 - i, reach - 1 - j), size)[:, :, None, :, None]
        * taps[i, :, None, j]
        for i in range(reach)
        for j in range(reach)
    )
    whole = whole.reshape(len(padded), stride * size[0], stride * size[1], channels)
    return _crop(whole, [span.start for span in spans], tuple(span.side for span in spans))


def _kernel_gradient(phases: list[list[Array]], kernel: Array, g: Array) -> Array:
    """Multiplies every tap with g and sums over images and positions.

    The sum is in float32, but for the first _GROUP images, whose products have the inputs' dtype.

    A plain sum runs at a tenth of the memory's speed. Adding the products of a few images first is
    elementwise, so it vectorises along channels; what is left is summed by a matrix product.
    """
    k, channels, n = kernel.shape[0], kernel.shape[-1], len(g)
    # The largest divisor: a batch of a prime number above _GROUP has groups of 1.
    group = next(size for size in range(min(_GROUP, n), 0, -1) if n % size == 0)
    taps = _taps(phases, g.shape[1:3])
    grouped = functools.partial(_split, group=group)
    g_parts = grouped(g)

    def reduce(tap: Array) -> Array:
        # [N / group, H', W', C], then [positions, C].
        products = sum(a * b for a, b in zip(grouped(tap), g_parts, strict=True))
        products = lax.optimization_barrier(products.reshape(-1, channels))
        ones = jnp.ones((1, len(products)), products.dtype)
        return jnp.matmul(ones, products, preferred_element_type=jnp.float32)

    sums = [reduce(taps(i, j)) for i in range(k) for j in range(k)]
    return jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


def _split(x: Array, group: int) -> list[Array]:
    parts = x.reshape(-1, group, *x.shape[1:])
    return [parts[:, i] for i in range(group)]
