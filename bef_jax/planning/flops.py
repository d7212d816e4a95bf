"""The arithmetic of a network, counted as the field does: two operations per multiply-add.

XLA's own count also has every elementwise operation. It is a count of the program that the compiler
made, not of the network.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bef_jax.data.patch import train_side
from bef_jax.models import create
from bef_jax.training.state import abstract_state


def training_flops(config: ConfigDict) -> int:
    """Returns the operations of a training step per image, and computes nothing.

    They are those of three forward passes, because each product takes two more for its gradients.
    """
    # Change a copy for the trace only: the network's arithmetic is the same in every form.
    network = config.model.copy_and_resolve_references()
    network.depthwise = "native"  # shifted products are elementwise, so they would not be found
    side = train_side(config)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    # Trace inference: in training, statistics come from covariances. Those products are only our
    # way to compute them, not the network's arithmetic.
    apply = functools.partial(create(network, config.dtype).apply, train=False)
    state = abstract_state(config)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    # Two operations per multiply-add. As in the field, this also counts the first convolution's
    # gradient by the images, which is never computed.
    return 3 * 2 * _multiply_adds(jax.make_jaxpr(apply)(variables, images).jaxpr)


def _multiply_adds(jaxpr) -> int:
    """Returns the multiply-adds of all convolutions and products, also in called functions."""
    return sum(
        _multiply_adds_of(equation) + sum(map(_multiply_adds, _called(equation)))
        for equation in jaxpr.eqns
    )


def _multiply_adds_of(equation) -> int:
    """Returns the multiply-adds of one equation: its outputs times the terms in each sum."""
    name, params = equation.primitive.name, equation.params
    if name not in ("conv_general_dilated", "dot_general"):
        return 0
    left, right = (operand.aval.shape for operand in equation.invars)
    if name == "dot_general":
        # ((contracted axes of left, right), (batch axes of left, right)); outputs have the latter.
        (axes, _), _ = params["dimension_numbers"]
        terms = math.prod(left[axis] for axis in axes)
    else:
        # Each output sums over all axes of the kernel except the output features: over a window,
        # and over the input features of a group.
        features = right[params["dimension_numbers"].rhs_spec[0]]
        terms = math.prod(right) // features
    return terms * math.prod(equation.outvars[0].aval.shape)


def _called(equation) -> Iterator:
    """Yields the jaxprs that an equation calls; of branches by platform, only the first."""
    for value in equation.params.values():
        value = value[0] if isinstance(value, tuple) and value else value
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
