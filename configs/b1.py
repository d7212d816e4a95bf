"""Boosted EfficientNet-B1."""

from ml_collections import ConfigDict

from bef_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration, with the fields named in `arg` changed."""
    return default.boosted("b1", arg)
