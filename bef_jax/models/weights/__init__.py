"""Reads weights of other packages as our variables, and turns our variables into timm's."""

from bef_jax.models.weights.reading import (
    convention,
    import_weights,
    normalisation,
    read,
    resolve,
    to_timm,
)

__all__ = ["convention", "import_weights", "normalisation", "read", "resolve", "to_timm"]
