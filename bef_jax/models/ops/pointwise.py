"""1 x 1 convolutions as matrix products, laid out as each platform wants them.

CPU multiplies matrices: with two axes instead of four, the kernel's gradient needs no transposed
copy of the activations. TPU keeps the batch in the fastest axis, so that flattening copies every
activation (88 passes over B3's hidden maps, compiled for v5e, instead of 25): it gets all axes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax


def pointwise(x: Array, kernel: Array | None) -> Array:
    """[N, H, W, K] times [K, C] -> [N, H, W, C]; None: just x."""
    if kernel is None:
        return x

    def flat(x: Array, kernel: Array) -> Array:
        return _multiply(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)

    # Decided when lowered, not when traced: a program for TPU can be compiled on a machine with a
    # CPU alone, as plans are.
    return lax.platform_dependent(x, kernel, cpu=flat, default=jnp.matmul)


@jax.custom_vjp
def _multiply(x: Array, kernel: Array) -> Array:
    """[M, K] @ [K, C], with a gradient of its own for the kernel."""
    return x @ kernel


def _multiply_forward(x: Array, kernel: Array):
    return x @ kernel, (x, kernel)


def _multiply_backward(residuals, g: Array):
    x, kernel = residuals
    return g @ kernel.T, _kernel_gradient(x, g)


def _kernel_gradient(x: Array, g: Array) -> Array:
    """[M, K], [M, C] -> [K, C]. With the narrow side first it takes a third to half of the time."""
    if x.shape[-1] <= g.shape[-1]:
        return x.T @ g
    # Without the barrier XLA would turn the product around, to save the transpose of few numbers.
    return lax.optimization_barrier(g.T @ x).T


_multiply.defvjp(_multiply_forward, _multiply_backward)


def grouped_pointwise(x: Array, kernel: Array) -> Array:
    """[G, N, H, W, K] times a kernel per group, [G, K, C] -> [G, N, H, W, C], of x's dtype."""

    def flat(x: Array, kernel: Array) -> Array:
        # [G, M, K] @ [G, K, C], M = N H W.
        return (_rows(x) @ kernel).reshape(*x.shape[:-1], -1)

    whole = functools.partial(jnp.einsum, "gnhwk,gkc->gnhwc")
    return lax.platform_dependent(x, kernel, cpu=flat, default=whole)


def grouped_moments(x: Array, y: Array) -> Array:
    """[G, N, H, W, K] and [G, N, H, W, C] -> the products' sums over positions, [G, K, C], float32.

    It is the gradient of a kernel, or, of centered x with itself, its covariance times positions.
    """
    # Summed in float32 whatever the dtype: N H W products are added up for each entry.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def flat(x: Array, y: Array) -> Array:
        return product("gmk,gmc->gkc", _rows(x), _rows(y))

    whole = functools.partial(product, "gnhwk,gnhwc->gkc")
    return lax.platform_dependent(x, y, cpu=flat, default=whole)


def _rows(x: Array) -> Array:
    return x.reshape(len(x), -1, x.shape[-1])
