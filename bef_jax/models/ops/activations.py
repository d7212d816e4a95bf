"""Activations and their derivatives, by name."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

# Layers pass an activation by its name, because the static arguments of a custom gradient must be
# hashable and compare equal in every trace: a lambda made in a layer would be compiled again each
# time.
ACTIVATIONS = {"none": lambda x: x, "silu": nn.silu, "relu": nn.relu, "relu6": nn.relu6}


def _silu_derivative(z: Array) -> Array:
    # This is (z sigmoid)' = sigmoid + z sigmoid (1 - sigmoid), with only one exponential.
    sigmoid = nn.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


# activation'(z), which is 0 at a corner, as in torch.
DERIVATIVES = {
    "none": jnp.ones_like,
    "silu": _silu_derivative,
    "relu": lambda z: (z > 0).astype(z.dtype),
    "relu6": lambda z: ((z > 0) & (z < 6)).astype(z.dtype),
}
