"""Weights of other packages: files of tensors in, our variables out; and the way back to timm."""

from bef_jax.models.weights.reading import (
    convention,
    import_weights,
    normalisation,
    read,
    resolve,
    to_timm,
)

__all__ = ["convention", "import_weights", "normalisation", "read", "resolve", "to_timm"]
