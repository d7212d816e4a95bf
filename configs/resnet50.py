"""ResNet-50 as published, for comparison. It can take the paper's changes, but has none."""

from ml_collections import ConfigDict

from bef_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration, with the fields named in `arg` changed."""
    config = default.get_config()
    config.name = "resnet50"
    config.model.name = "resnet50"
    config.model.padding = "symmetric"  # as in torchvision, so that its weights fit; epsilon too
    config.model.bn_epsilon = 1e-5
    # He et al. 2016 use neither.
    config.model.dropout = 0.0
    config.model.drop_path = 0.0
    config.rcc.enabled = False
    return default.apply_arg(config, arg)
