"""The networks as Linen modules, found by name; their parts; and weights of other packages."""

from bef_jax.models.registry import (
    REGISTRY,
    create,
    is_attention,
    is_classifier,
    is_frozen,
    parameter_paths,
    stages,
)

__all__ = [
    "REGISTRY",
    "create",
    "is_attention",
    "is_classifier",
    "is_frozen",
    "parameter_paths",
    "stages",
]
