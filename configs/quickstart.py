"""A first look: a tiny network with all four changes, on synthetic patches.

bash launch/local.sh train
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration, with the fields named in `arg` changed."""
    config = default.boosted("b0")
    config.name = "quickstart"
    config.epochs = 8.0
    config.model.name = "efficientnet_test"
    config.data.source = "synthetic"
    config.data.dir = "data/synthetic"
    return default.apply_arg(config, arg)
