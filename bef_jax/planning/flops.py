"""The arithmetic of a network, counted as the field does: two operations per multiply-add.

XLA's own count has every elementwise operation besides, and that of the program which the compiler
made, not of the network.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bef_jax.data.patch import PATCH
from bef_jax.models import create
from bef_jax.training.state import abstract_state


def training_flops(config: ConfigDict) -> int:
    """Operations of a training step per image; nothing is computed.

    They are those of three forward passes: each product has two more, its gradients.
    """
    # A copy, for the trace alone: whichever form runs, the network's arithmetic is the same.
    network = config.model.copy_and_resolve_references()
    network.depthwise = "native"  # shifted products are elementwise, and would not be found
    size = config.rcc.max_size if config.rcc.enabled else PATCH
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    # In inference: the covariances from which training takes statistics are our way to compute
    # them, not the network's arithmetic.
    apply = functools.partial(create(network, config.dtype).apply, train=False)
    state = abstract_state(config)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    # Two operations per multiply-add; the first convolution's gradient by the images, which nobody
    # takes, is counted, too: the field does so.
    return 3 * 2 * _multiply_adds(jax.make_jaxpr(apply)(variables, images).jaxpr)


def _multiply_adds(jaxpr) -> int:
    """Those of every convolution and product, and of what is called."""
    return sum(
        _of_equation(equation) + sum(map(_multiply_adds, _called(equation)))
        for equation in jaxpr.eqns
    )


def _of_equation(equation) -> int:
    """Outputs times what each is the sum of."""
    name, params = equation.primitive.name, equation.params
    if name not in ("conv_general_dilated", "dot_general"):
        return 0
    left, right = (operand.aval.shape for operand in equation.invars)
    if name == "dot_general":
        # ((contracted of left, of right), (batch of left, of right)); batch axes are in the output.
        (axes, _), _ = params["dimension_numbers"]
        terms = math.prod(left[axis] for axis in axes)
    else:
        # Windows and inputs of a group: the kernel's size less its output features.
        features = right[params["dimension_numbers"].rhs_spec[0]]
        terms = math.prod(right) // features
    return terms * math.prod(equation.outvars[0].aval.shape)


def _called(equation) -> Iterator:
    """The jaxprs of functions that an equation calls; one of the branches for platforms."""
    for value in equation.params.values():
        value = value[0] if isinstance(value, tuple) and value else value
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
