"""Batch normalisation, squeeze-excite and projection for GPUs, in few kernels and passes.

The arithmetic is that of `norm` and of `layers.SqueezeExcite`. Here it is divided into the passes
over memory that XLA's compiler for GPUs makes of it:

- What is cheap is computed again where it is needed: z, the activation and its derivative. XLA
  would rather keep such a map, in float32, which is twice as large as the map that it comes from.
  So a pass that repeats what an earlier one computed begins with a barrier, behind which XLA does
  not see the repetition.
- A kernel that sums over positions has room for two sums. So a pass over the maps takes no more.

XLA decides by its own estimate of costs, which these rules were tried on with 256 images. With few
(say, 32 of 3 x 3 positions), it may still keep a float32 map.

Symbols are those of `norm`, with factor = scale * inverse_std and offset = bias - mean * factor, so
that z = x * factor + offset. Maps are [G, n, P, C]: groups that have statistics of their own, their
images, positions and channels. Statistics, parameters and sums are float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from bef_jax.models.ops.activations import ACTIVATIONS, DERIVATIVES

Params = dict[str, Any]


@struct.dataclass
class Norm:
    """A norm with the statistics of a batch; each array is [G, C]."""

    mean: Array
    inverse_std: Array
    factor: Array
    offset: Array

    def __call__(self, maps: Array) -> Array:
        """Returns z, float32."""
        return _float32(maps) * _per_channel(self.factor) + _per_channel(self.offset)


def forward(x: Array, scale: Array, bias: Array, groups: int, epsilon: float, activation: str):
    """Returns what `norm.batch_norm` does, and the residuals for `backward`."""
    maps = _maps(x, groups)
    norm, var = _normalise(maps, scale, bias, epsilon)
    y = ACTIVATIONS[activation](norm(maps))
    return (y.astype(x.dtype).reshape(x.shape), norm.mean, var), (x, norm)


def backward(groups: int, activation: str, residuals, g: Array) -> tuple[Array, Array, Array]:
    """Returns dx, dscale and dbias of `norm.batch_norm`, given g, the gradient of y."""
    x, norm = residuals
    g = _maps(g, groups)
    dx, *gradients = _gradients(norm, _maps(x, groups), activation, lambda: _float32(g))
    return dx.reshape(x.shape), *gradients


def _normalise(maps: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Norm, Array]:
    """Returns the norm of the maps, and their (biased) variance [G, C]."""
    mean, square = _moments(_float32(maps))
    var = jnp.maximum(square - mean * mean, 0.0)
    inverse_std = lax.rsqrt(var + epsilon)
    factor = scale * inverse_std
    return Norm(mean, inverse_std, factor, bias - mean * factor), var


def _gradients(
    norm: Norm, maps: Array, activation: str, da: Callable[[], Array]
) -> tuple[Array, Array, Array]:
    """Returns dx, of the shape and dtype of the maps, dscale and dbias [C], in two passes.

    The formulas are those of `norm._batch_norm_backward`. dx is written as a linear function of dz
    and x, because its coefficients are numbers per channel, computed once.

    Args:
        da: computes the gradient of the activated maps, in each pass again.
    """
    derivative = DERIVATIVES[activation]
    maps = lax.optimization_barrier(maps)
    dbias, dscale = _sums_of_gradient(da() * derivative(norm(maps)), _float32(maps))
    dscale = (dscale - norm.mean * dbias) * norm.inverse_std
    by_x = -norm.factor * norm.inverse_std * dscale / _rows(maps)
    constant = -norm.factor * dbias / _rows(maps) - by_x * norm.mean
    maps = lax.optimization_barrier(maps)
    dx = _per_channel(norm.factor) * (da() * derivative(norm(maps)))
    dx = dx + (_float32(maps) * _per_channel(by_x) + _per_channel(constant))
    return dx.astype(maps.dtype), dscale.sum(0), dbias.sum(0)


# ---- with squeeze-excite and the projection -----------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def norm_excite_project(
    x: Array,
    norm_params: Params,
    excite_params: Params,
    kernel: Array,
    groups: int,
    epsilon: float,
    activation: str,
):
    """Normalises, activates, gates by squeeze-excite (Hu et al. 2018), and projects.

    y = (a * gate) @ kernel with a = activation(z) and gate = excite(mean of a over positions), one
    number for each image and channel.

    If a map has at least three positions for each output channel, the gate multiplies the kernel
    instead, so that every image has its own: y = a @ (gate * kernel). Then a is written once,
    together with its mean. The gradients of gate and kernel both come from each image's moments =
    a^T @ dy, so that none of them needs a pass over a and its gradient. This saves three passes.

    Args:
        x: [N, H, W, C]; N a multiple of `groups`.
        norm_params: scale and bias, [C], float32.
        excite_params: those of `layers.SqueezeExcite`, float32.
        kernel: [C, M], float32.

    Returns:
        y [N, H, W, M] of x's dtype; mean and (biased) variance [groups, C] of x, float32, through
        which no gradient flows.
    """
    options = (groups, epsilon, activation)
    return _excite_forward(x, norm_params, excite_params, kernel, *options)[0]


def _excite_forward(
    x, norm_params: Params, params: Params, kernel, groups: int, epsilon: float, activation: str
):
    maps, act = _maps(x, groups), ACTIVATIONS[activation]
    norm, var = _normalise(maps, norm_params["scale"], norm_params["bias"], epsilon)
    a = act(norm(maps))
    # Divide before the sum, because a kernel that ends in a sum does nothing after it.
    pooled = jnp.sum(a / maps.shape[2], 2)  # [G, n, C]
    gate = excite(params, pooled)
    kernels = None
    if _gates_kernel(maps, kernel):
        kernels = (gate[..., None] * kernel).astype(x.dtype)  # [G, n, C, M]
        kept = a.astype(x.dtype)
        y = jnp.einsum("gnpc,gncm->gnpm", kept, kernels)
    else:
        again = act(norm(lax.optimization_barrier(maps)))
        kept = (again * gate[:, :, None]).astype(x.dtype)
        y = kept @ kernel.astype(x.dtype)
    residuals = (x, norm, params, kernel, pooled, gate, kernels, kept)
    return (y.reshape(*x.shape[:-1], -1), norm.mean, var), residuals


def _gates_kernel(maps: Array, kernel: Array) -> bool:
    # A kernel of each image and its moments move about 12 bytes for each of their numbers; the
    # three passes that they save move 4 for each number of an image's map.
    return maps.shape[2] >= 3 * kernel.shape[-1]


def _excite_backward(groups: int, epsilon: float, activation: str, residuals, cotangents):
    """Returns the gradients of x, norm_params, excite_params and kernel, given that of y."""
    del epsilon
    x, norm, params, kernel, pooled, gate, kernels, kept = residuals
    dy, _, _ = cotangents  # mean and var only feed the running statistics, not the loss
    maps, dy = _maps(x, groups), _maps(dy, groups)
    if kernels is not None:
        moments = _product("gnpc,gnpm->gncm", kept, dy)
        dkernel = _product("gncm,gnc->cm", moments, gate)
        dgate = _product("gncm,cm->gnc", moments, kernel)
        g, by_image = jnp.einsum("gnpm,gncm->gnpc", dy, kernels), 1.0
    else:
        dkernel = _product("gnpc,gnpm->cm", kept, dy)
        g, by_image = dy @ kernel.astype(x.dtype).T, gate[:, :, None]
        maps = lax.optimization_barrier(maps)
        dgate = jnp.sum(_float32(g) * ACTIVATIONS[activation](norm(maps)), 2)
    _, excite_gradient = jax.vjp(excite, params, pooled)
    dparams, dpooled = excite_gradient(dgate)
    # The passes that read dpooled multiply it by this. A division would get a kernel of its own.
    share = 1 / maps.shape[2]
    dx, dscale, dbias = _gradients(
        norm, maps, activation, lambda: _float32(g) * by_image + dpooled[:, :, None] * share
    )
    return dx.reshape(x.shape), {"scale": dscale, "bias": dbias}, dparams, dkernel


norm_excite_project.defvjp(_excite_forward, _excite_backward)


def excite(params: Params, pooled: Array) -> Array:
    """Returns `layers.SqueezeExcite`'s gate for pooled features; both are [G, n, C]."""

    def dense(x: Array, layer: Params) -> Array:
        # With the barrier, cuBLAS reads the kernel where it lies in a vector (`training.packing`),
        # and the next kernel adds the bias. Otherwise cuBLAS adds it, from copies of both.
        return lax.optimization_barrier(x @ layer["kernel"]) + layer["bias"]

    hidden = nn.silu(dense(pooled, params["reduce"]))
    return nn.sigmoid(dense(hidden, params["expand"]))


# ---- sums over images and positions -------------------------------------------------------------

# Rows are summed in two steps, first those of each part and then the parts, because one kernel for
# all rows would keep few of a GPU's cores busy. XLA adds fewer than 32 numbers within the kernel
# that uses their sum, so that few parts cost no second kernel.
_FEW_ROWS = 2**14  # up to which few parts are enough
_MOST_FEW = 31
_LEAST_SUMS = 2**16  # of the first step, to keep all cores busy with the gradient of an activation
_ROWS_OF_PART = (32, 1024)  # of a gradient; XLA would divide larger parts again


def _moments(x: Array) -> tuple[Array, Array]:
    """Returns the means of x and x * x, [G, C]."""
    rows = _rows(x)
    few = max((n for n in _divisors(x) if n <= _MOST_FEW), default=None)
    few = few if rows <= _FEW_ROWS else None
    x = _divided(x, few or _parts(x))
    sums = _reduce(x, x * x, 2)
    total, square = (part.sum(1) for part in sums) if few else _reduce(*sums, 1)
    return total / rows, square / rows


def _sums_of_gradient(dz: Array, x: Array) -> tuple[Array, Array]:
    """Returns the sums of dz and dz * x, [G, C]."""
    # Each is a reduction of its own here, because XLA would compute dz twice for a common one, and
    # then finds it cheaper to keep the map. It puts the two into one kernel afterwards.
    sums = (_divided(term, _parts(dz)).sum(2) for term in (dz, dz * x))
    return _reduce(*sums, 1)


def _parts(maps: Array) -> int:
    """Returns into how many equal parts the rows are divided, which are summed first."""
    rows, (least, most) = _rows(maps), _ROWS_OF_PART
    numbers = _divisors(maps)
    numbers = [n for n in numbers if rows >= n * least] or numbers[:1]
    enough = (n for n in numbers if n * maps.shape[-1] >= _LEAST_SUMS and rows <= n * most)
    return next(enough, numbers[-1])


def _divisors(maps: Array) -> list[int]:
    """Returns numbers of parts that divide the rows, so that each part is on one device."""
    groups, rows = len(maps), _rows(maps)
    devices = max(jax.sharding.get_abstract_mesh().size, 1)  # 0 without a mesh
    # The number of devices that share the rows of a group.
    shards = devices // math.gcd(groups, devices)
    numbers = [shards * 2**i for i in range(rows.bit_length())]
    return [n for n in numbers if rows % n == 0] or [1]


def _divided(maps: Array, parts: int) -> Array:
    """Returns [G, parts, rows / parts, C]."""
    return maps.reshape(maps.shape[0], parts, -1, maps.shape[-1])


def _reduce(a: Array, b: Array, axis: int) -> tuple[Array, Array]:
    """Returns the sums of two arrays of one shape along an axis, by one kernel."""

    def add(x, y):
        return x[0] + y[0], x[1] + y[1]

    zero = jnp.zeros((), jnp.float32)
    return tuple(lax.reduce((a, b), (zero, zero), add, (axis,)))


# ---- shapes -------------------------------------------------------------------------------------


def _maps(x: Array, groups: int) -> Array:
    """Returns [N, ..., C] as [G, n, P, C]."""
    positions = math.prod(x.shape[1:-1])
    maps = lax.reshape(x, (groups, len(x) // groups, positions, x.shape[-1]))
    if jax.sharding.get_abstract_mesh().size > 1:
        return maps  # with the constraint, jax 0.10 would copy all maps to all devices
    # Channels stay last in memory. Otherwise a barrier may get the layout of a neighbour, such as
    # the gradient of a mean over positions, and then maps are transposed.
    return with_layout_constraint(maps, Layout((0, 1, 2, 3)))


def _rows(maps: Array) -> int:
    return maps.shape[1] * maps.shape[2]


def _per_channel(x: Array) -> Array:
    return x[:, None, None]


def _float32(x: Array) -> Array:
    return x.astype(jnp.float32)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
