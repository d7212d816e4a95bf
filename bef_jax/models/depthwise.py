"""Depthwise convolution, in the form that each platform runs fastest.

XLA's grouped convolution is 15 to 25 times slower on CPU than multiplying shifted views of the
input and adding them up, and the gradient that JAX derives for the latter costs 20 times its
forward pass. So CPU gets that form with a gradient of its own; GPU and TPU get the native
convolution. Lowering decides (`jax.lax.platform_dependent`): the caller never does.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)

_GROUP = 8  # images added up elementwise before positions are: 16 is slower on small maps


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Convolves every channel with its own kernel (a correlation, as everywhere in the field).

    Args:
        x: [N, H, W, C], floating.
        kernel: [k, k, 1, C] of the same dtype, as Linen's `Conv(feature_group_count=C)` keeps it.
        stride: 1 or 2, along height and width.
        padding: zeros added before and after height and width.

    Returns:
        [N, H', W', C] with H' = (H + top + bottom - k) // stride + 1, of x's dtype.
    """
    shifted = functools.partial(_shifted, stride=stride, padding=padding)
    native = functools.partial(_native, stride=stride, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=shifted, default=native)


def _forward(x: Array, kernel: Array, stride: int, padding: Padding):
    return depthwise_conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: Padding, residuals, cotangent: Array):
    shifted = functools.partial(_shifted_gradients, stride=stride, padding=padding)
    native = functools.partial(_native_gradients, stride=stride, padding=padding)
    return lax.platform_dependent(*residuals, cotangent, cpu=shifted, default=native)


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


def _native_gradients(x: Array, kernel: Array, cotangent: Array, stride: int, padding: Padding):
    _, pullback = jax.vjp(lambda x, kernel: _native(x, kernel, stride, padding), x, kernel)
    return pullback(cotangent)


# ---- shift, multiply, add -----------------------------------------------------------------------


def _shifted(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    k = kernel.shape[0]
    taps = _taps(x, k, stride, padding)
    return sum(taps(i, j) * kernel[i, j, 0] for i in range(k) for j in range(k))


def _taps(x: Array, k: int, stride: int, padding: Padding):
    """Returns `taps(i, j)`: what kernel position (i, j) multiplies, [N, H', W', C].

    The padded input stands behind a barrier: XLA would otherwise fuse the padding into every tap,
    and test each element for the border instead of loading vectors. Stride 2 splits it into its
    four phases first, for the same reason.
    """
    height, width = (
        (size + sum(pad) - k) // stride + 1 for size, pad in zip(x.shape[1:3], padding, strict=True)
    )
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    phases = [[padded[:, p::stride, q::stride] for q in range(stride)] for p in range(stride)]
    phases = lax.optimization_barrier(phases)

    def tap(i: int, j: int) -> Array:
        phase = phases[i % stride][j % stride]
        top, left = i // stride, j // stride
        return phase[:, top : top + height, left : left + width]

    return tap


def _shifted_gradients(x: Array, kernel: Array, cotangent: Array, stride: int, padding: Padding):
    by_input = _input_gradient if stride == 1 else _input_gradient_by_phases
    return (
        by_input(x.shape, kernel, cotangent, stride, padding),
        _kernel_gradient(x, kernel, cotangent, stride, padding),
    )


def _input_gradient(shape, kernel: Array, cotangent: Array, stride: int, padding: Padding) -> Array:
    """Correlates the cotangent with the flipped kernel."""
    del shape, stride
    k = kernel.shape[0]
    flipped = tuple((k - 1 - before, k - 1 - after) for before, after in padding)
    return _shifted(cotangent, kernel[::-1, ::-1], 1, flipped)


def _input_gradient_by_phases(
    shape, kernel: Array, cotangent: Array, stride: int, padding: Padding
):
    """Each phase of the padded input gets the taps that fell on it, a correlation of its own.

    Dilating the cotangent with zeros instead would multiply four times as much, mostly by zero.
    """
    (top, bottom), (left, right) = padding
    height, width = shape[1] + top + bottom, shape[2] + left + right
    rows = [
        [_phase_gradient(kernel[p::2, q::2], cotangent, -(-(height - p) // 2), -(-(width - q) // 2))
         for q in range(stride)]
        for p in range(stride)
    ]  # fmt: skip
    padded = _interleave([_interleave(row, 2)[:, :, :width] for row in rows], 1)[:, :height]
    return padded[:, top : top + shape[1], left : left + shape[2]]


def _phase_gradient(kernel: Array, cotangent: Array, height: int, width: int) -> Array:
    """The full correlation of the cotangent with one phase's taps, [N, height, width, C]."""
    rows, columns = kernel.shape[:2]
    below, beside = height - cotangent.shape[1], width - cotangent.shape[2]
    padded = jnp.pad(cotangent, ((0, 0), (rows - 1, below), (columns - 1, beside), (0, 0)))
    padded = lax.optimization_barrier(padded)
    return sum(
        padded[:, rows - 1 - i :, columns - 1 - j :][:, :height, :width] * kernel[i, j, 0]
        for i in range(rows)
        for j in range(columns)
    )


def _interleave(phases: list[Array], axis: int) -> Array:
    """a, b -> a0, b0, a1, b1, ... along `axis`; a shorter b gets a zero at its end."""
    first, second = phases
    missing = first.shape[axis] - second.shape[axis]
    pads = [(0, missing if i == axis else 0) for i in range(first.ndim)]
    stacked = jnp.stack([first, jnp.pad(second, pads)], axis + 1)
    return stacked.reshape(*first.shape[:axis], -1, *first.shape[axis + 1 :])


def _kernel_gradient(x: Array, kernel: Array, cotangent: Array, stride: int, padding: Padding):
    """Multiplies every tap with the cotangent and sums over images and positions, in float32.

    A plain sum runs at a tenth of the memory's speed. Adding the products of a few images first is
    elementwise, so it vectorises along channels; what is left is summed by a matrix product.
    """
    k, n, channels = kernel.shape[0], x.shape[0], x.shape[-1]
    group = next(size for size in range(min(_GROUP, n), 0, -1) if n % size == 0)
    taps = _taps(x, k, stride, padding)
    grouped = functools.partial(_split, group=group)
    upstream = grouped(cotangent)

    def reduce(tap: Array) -> Array:
        products = sum(a * b for a, b in zip(grouped(tap), upstream, strict=True))
        products = lax.optimization_barrier(products.reshape(-1, channels))
        ones = jnp.ones((1, len(products)), products.dtype)
        return jnp.matmul(ones, products, preferred_element_type=jnp.float32)

    sums = [reduce(taps(i, j)) for i in range(k) for j in range(k)]
    return jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


def _split(x: Array, group: int) -> list[Array]:
    parts = x.reshape(-1, group, *x.shape[1:])
    return [parts[:, i] for i in range(group)]
