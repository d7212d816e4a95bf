"""Reads weights of other packages as our variables, and turns our variables into timm's."""

from bef_jax.models.weights.reading import Weights, import_weights, read, resolve, to_timm

__all__ = ["Weights", "import_weights", "read", "resolve", "to_timm"]
