"""Depthwise convolution, in the form that each platform runs fastest.

The shift form multiplies shifted views of the input, one for each position of the kernel (a tap),
and adds them up. On CPU, XLA's grouped convolution is 15 to 25 times slower. JAX's own gradient of
the shift form costs 20 times its forward pass, so the shift form has a custom gradient. GPU and TPU
get the native convolution, except that a GPU shifts for dx at stride 2. By default the form is
chosen when a program is lowered (`jax.lax.platform_dependent`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)

# Number of images whose products `_kernel_gradient` adds elementwise first. 16 is slower on small
# maps.
_GROUP = 8


def output_size(
    size: tuple[int, int], kernel: int, stride: int, padding: Padding
) -> tuple[int, int]:
    """Returns H' and W' of a convolution of maps [H, W] by a kernel of side `kernel`."""
    sides = zip(size, padding, strict=True)
    height, width = ((side + sum(pad) - kernel) // stride + 1 for side, pad in sides)
    return height, width


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise_conv(
    x: Array, kernel: Array, stride: int, padding: Padding, form: str = "auto"
) -> Array:
    """Convolves every channel with its own kernel (a correlation, as is usual in the field).

    Args:
        x: [N, H, W, C], floating.
        kernel: [k, k, 1, C] of the same dtype, the layout of Linen's `Conv(feature_group_count=C)`.
        stride: 1 or 2, along height and width; at most k.
        padding: zeros added before and after height and width, fewer than k on each side.
        form: auto (by platform), native (XLA's convolution) or shift (shift, multiply, add).

    Returns:
        [N, H', W', C] with H' = (H + top + bottom - k) // stride + 1, of x's dtype.
    """
    shifted = functools.partial(_shifted, stride=stride, padding=padding)
    native = functools.partial(_native, stride=stride, padding=padding)
    return _choose_form(form, shifted, native, on_gpu=native)(x, kernel)


def _forward(x: Array, kernel: Array, stride: int, padding: Padding, form: str):
    return depthwise_conv(x, kernel, stride, padding, form), (x, kernel)


def _backward(stride: int, padding: Padding, form: str, residuals, g: Array):
    shifted = functools.partial(_shifted_gradients, stride=stride, padding=padding)
    native = functools.partial(_native_gradients, stride=stride, padding=padding)
    mixed = functools.partial(_mixed_gradients, stride=stride, padding=padding)
    on_gpu = mixed if stride > 1 else native
    return _choose_form(form, shifted, native, on_gpu)(*residuals, g)


def _choose_form(form: str, shifted: Callable, native: Callable, on_gpu: Callable) -> Callable:
    options = {"cpu": shifted, "cuda": on_gpu, "default": native}
    by_platform = functools.partial(lax.platform_dependent, **options)
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
    # XLA leaves out the forward convolution, because its result is not used here.
    _, pullback = jax.vjp(lambda x, kernel: _native(x, kernel, stride, padding), x, kernel)
    return pullback(g)


def _mixed_gradients(x: Array, kernel: Array, g: Array, stride: int, padding: Padding):
    """Returns dx [N, H, W, C] by shifting, and dkernel [k, k, 1, C] by XLA's convolution.

    g is the gradient of the output, [N, H', W', C]. At stride 2, XLA's dx is a convolution of g
    with zeros between its elements. A GPU would write these zeros and read them: four times as many
    numbers as g has.
    """
    _, pullback = jax.vjp(lambda kernel: _native(x, kernel, stride, padding), kernel)
    padded_g, spans = _padded_gradient(x, kernel, g, stride, padding)
    dx = _input_gradient(padded_g, kernel, stride, spans)
    if kernel.shape[0] > 2 * stride:
        # Otherwise XLA computes these many products within the gradient of the norm before, and
        # writes that in float32.
        dx = lax.optimization_barrier(dx)
    return dx, *pullback(g)


# ---- shift, multiply, add -----------------------------------------------------------------------


def _shifted(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    k = kernel.shape[0]
    phases = lax.optimization_barrier(_padded_phases(x, stride, padding))
    view = _views(phases, output_size(x.shape[1:3], k, stride, padding))
    # There are k * k views of the phases, each [N, H', W', C].
    return sum(view(i, j) * kernel[i, j, 0] for i in range(k) for j in range(k))


def _padded_phases(x: Array, stride: int, padding: Padding) -> list[list[Array]]:
    """Returns the padded input, split into its stride * stride phases.

    The caller puts a barrier after it. Otherwise XLA would fuse the padding into every view, and
    test each element for the border instead of loading vectors. Views that skip elements would be
    as slow, so the phases are made once, too.
    """
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return [[padded[:, p::stride, q::stride] for q in range(stride)] for p in range(stride)]


def _views(phases: list[list[Array]], size: tuple[int, int]) -> Callable[[int, int], Array]:
    """Returns a function view(i, j) -> [N, *size, C], the values that kernel[i, j] multiplies."""
    stride = len(phases)
    return lambda i, j: _crop(phases[i % stride][j % stride], (i // stride, j // stride), size)


def _crop(x: Array, corner: Sequence[int], size: tuple[int, int]) -> Array:
    (top, left), (height, width) = corner, size
    return x[:, top : top + height, left : left + width]


def _shifted_gradients(x: Array, kernel: Array, g: Array, stride: int, padding: Padding):
    """Returns dx [N, H, W, C] and dkernel [k, k, 1, C] from g [N, H', W', C].

    g is the gradient of the output; x is [N, H, W, C], and kernel is [k, k, 1, C].

    Both results read one padded copy of g, which is kept in memory. Without it, XLA would repeat,
    in every tap, the code that computes g: the gradients of batch normalisation and SiLU.
    """
    padded_g, spans = _padded_gradient(x, kernel, g, stride, padding)
    corner = [span.before for span in spans]
    phases = _padded_phases(x, stride, padding)
    # The phases and g share one barrier. A barrier for the phases alone would equal that of the
    # forward pass, so XLA would merge the two barriers. Then both passes would use each view, so
    # XLA would write all views to memory.
    phases, padded_g = lax.optimization_barrier((phases, padded_g))
    dx = _input_gradient(padded_g, kernel, stride, spans)
    return dx, _kernel_gradient(phases, kernel, _crop(padded_g, corner, g.shape[1:3]))


def _padded_gradient(
    x: Array, kernel: Array, g: Array, stride: int, padding: Padding
) -> tuple[Array, list["_Span"]]:
    """Returns g with the zeros that `_input_gradient` needs around it, and its spans."""
    sides = zip(x.shape[1:3], g.shape[1:3], padding, strict=True)
    spans = [_span(kernel.shape[0], stride, *side) for side in sides]
    return jnp.pad(g, ((0, 0), *((span.before, span.after) for span in spans), (0, 0))), spans


@dataclasses.dataclass(frozen=True)
class _Span:
    """Along height or width: the zeros around g, and what to keep of the padded input's gradient.

    For position p of the padded input and a tap t that reads it, a = p // stride, i = t // stride
    and phase = p % stride = t % stride. Then tap t reads p for output a - i.
    """

    before: int  # zeros before g
    after: int  # zeros after g
    length: int  # number of values of a
    start: int  # where the input begins after the phases are interleaved
    side: int  # of the input


def _span(k: int, stride: int, side: int, outputs: int, pad: tuple[int, int]) -> _Span:
    # The values of a at the first and the last element of the unpadded input.
    first, last = pad[0] // stride, (pad[0] + side - 1) // stride
    start = pad[0] - stride * first
    # The tap with the largest i reads the first element for output first - i, which may be below 0.
    largest_i = -(-k // stride) - 1
    return _Span(largest_i - first, max(last - outputs + 1, 0), last - first + 1, start, side)


def _input_gradient(padded_g: Array, kernel: Array, stride: int, spans: list[_Span]) -> Array:
    """Returns dx [N, H, W, C]: each input gets the sum of g * weight over the outputs that read it.

    `padded_g` is g with the zeros that `spans` names. Each phase of dx is a convolution (the taps
    run backwards over g). Dilating g with zeros instead would need stride^2 times as many products,
    most of them with zero.

    XLA fuses this into one loop over [N, a, phase, b, phase, C] (a along height, b along width),
    which broadcasts g. If dx were put together from stride^2 arrays, every element would have to
    look up its array.
    """
    k, channels = kernel.shape[0], kernel.shape[-1]
    reach = -(-k // stride)  # taps per axis of the phase that has the most
    # [i, phase, j, phase, C], with zeros where a phase has one tap less.
    rest = (0, reach * stride - k)
    weights = jnp.pad(kernel[:, :, 0], (rest, rest, (0, 0)))
    weights = weights.reshape(reach, stride, reach, stride, channels)
    size = tuple(span.length for span in spans)
    # [N, a, 1, b, 1, C] * [phase, 1, phase, C]. The first output in padded_g is that of the largest
    # i, reach - 1, for the first a.
    whole = sum(
        _crop(padded_g, (reach - 1 - i, reach - 1 - j), size)[:, :, None, :, None]
        * weights[i, :, None, j]
        for i in range(reach)
        for j in range(reach)
    )
    whole = whole.reshape(len(padded_g), stride * size[0], stride * size[1], channels)
    return _crop(whole, [span.start for span in spans], tuple(span.side for span in spans))


def _kernel_gradient(phases: list[list[Array]], kernel: Array, g: Array) -> Array:
    """Returns dkernel [k, k, 1, C]: the sum of g * (input read by a tap) over images and positions.

    `phases` hold the padded x; g is [N, H', W', C]. The products of up to _GROUP images are added
    in the dtype of g, and everything else in float32.

    A plain sum would run at a tenth of the speed of memory. The sum over a group of images is
    elementwise, so it vectorises along channels. A matrix product adds up the rest.
    """
    k, channels, n = kernel.shape[0], kernel.shape[-1], len(g)
    # The largest divisor of n up to _GROUP; it is 1 if n is a prime number above _GROUP.
    group = next(size for size in range(min(_GROUP, n), 0, -1) if n % size == 0)
    view = _views(phases, g.shape[1:3])
    grouped = functools.partial(_split, group=group)
    g_parts = grouped(g)

    def reduce(x: Array) -> Array:
        # [N / group, H', W', C], then [N / group * H' * W', C].
        products = sum(a * b for a, b in zip(grouped(x), g_parts, strict=True))
        products = lax.optimization_barrier(products.reshape(-1, channels))
        ones = jnp.ones((1, len(products)), products.dtype)
        return jnp.matmul(ones, products, preferred_element_type=jnp.float32)

    sums = [reduce(view(i, j)) for i in range(k) for j in range(k)]
    return jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


def _split(x: Array, group: int) -> list[Array]:
    parts = x.reshape(-1, group, *x.shape[1:])
    return [parts[:, i] for i in range(group)]
