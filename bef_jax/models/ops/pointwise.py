"""1 x 1 convolutions as matrix products, in the best layout for each platform.

CPU gets matrices with two axes instead of four, so that the kernel's gradient needs no transposed
copy of the activations. TPU and GPU get all axes. TPU keeps the batch in the fastest axis, so that
flattening would copy every activation. Compiled for v5e, EfficientNet-B3's expanded activations
would then need 88 passes over memory instead of 25.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax


def pointwise(x: Array, kernel: Array | None) -> Array:
    """Returns x [N, H, W, K] @ kernel [K, C] -> [N, H, W, C]; x itself if kernel is None."""
    if kernel is None:
        return x

    def flat(x: Array, kernel: Array) -> Array:
        return _multiply(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)

    # The form is chosen when the program is lowered, not when it is traced. So a machine that has
    # only a CPU can compile a program for TPU, as the planning of runs does.
    return lax.platform_dependent(x, kernel, cpu=flat, default=jnp.matmul)


@jax.custom_vjp
def _multiply(x: Array, kernel: Array) -> Array:
    """Returns [M, K] @ [K, C], with a custom gradient for the kernel."""
    return x @ kernel


def _multiply_forward(x: Array, kernel: Array):
    return x @ kernel, (x, kernel)


def _multiply_backward(residuals, g: Array):
    x, kernel = residuals
    return g @ kernel.T, _kernel_gradient(x, g)


def _kernel_gradient(x: Array, g: Array) -> Array:
    """Returns dkernel [K, C] from x [M, K] and g [M, C].

    With the narrow matrix first, the product takes a third to a half of the time.
    """
    if x.shape[-1] <= g.shape[-1]:
        return x.T @ g
    # Without the barrier XLA would swap the matrices, to save the transpose of a small result.
    return lax.optimization_barrier(g.T @ x).T


_multiply.defvjp(_multiply_forward, _multiply_backward)


def grouped_pointwise(x: Array, kernel: Array) -> Array:
    """Returns x [G, N, H, W, K] times each group's kernel [G, K, C]: [G, N, H, W, C], x's dtype."""

    def flat(x: Array, kernel: Array) -> Array:
        # [G, M, K] @ [G, K, C], with M = N H W.
        return (_rows(x) @ kernel).reshape(*x.shape[:-1], -1)

    whole = functools.partial(jnp.einsum, "gnhwk,gkc->gnhwc")
    return lax.platform_dependent(x, kernel, cpu=flat, default=whole)


def grouped_moments(x: Array, y: Array) -> Array:
    """Returns x^T @ y for each group, [G, K, C], float32, from [G, N, H, W, K] and [G, N, H, W, C].

    It is a kernel's gradient if y is that of the product. It is the covariance of x times the
    number of positions if both arguments are the centered x.
    """
    # The sum is in float32 for every dtype, because each entry adds up N H W products.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def flat(x: Array, y: Array) -> Array:
        return product("gmk,gmc->gkc", _rows(x), _rows(y))

    whole = functools.partial(product, "gnhwk,gnhwc->gkc")
    return lax.platform_dependent(x, y, cpu=flat, default=whole)


def _rows(x: Array) -> Array:
    return x.reshape(len(x), -1, x.shape[-1])
