"""The networks: Linen modules by name, what they are built of, and weights of other packages."""

from bef_jax.models.registry import (
    REGISTRY,
    create,
    is_frozen,
    is_untrained_part,
    num_stages,
    parameter_paths,
)

__all__ = ["REGISTRY", "create", "is_frozen", "is_untrained_part", "num_stages", "parameter_paths"]
