"""The networks as Linen modules, found by name; their parts; and weights of other packages."""

from bef_jax.models.registry import (
    REGISTRY,
    create,
    is_frozen,
    lacks_pretrained,
    num_stages,
    parameter_paths,
)

__all__ = ["REGISTRY", "create", "is_frozen", "lacks_pretrained", "num_stages", "parameter_paths"]
