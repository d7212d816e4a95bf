"""One CPU, from scratch: Boosted EfficientNet-B0 on small windows.

    bef-jax --config=laptop --config.data.dir=DIR

Total stride 32 and 64 px windows take a fraction of the time of whole patches at 16. With
`--config.epochs=20 --config.optim.warmup_epochs=1` these fields reached a valid AUC of 0.9329 on
19,171 patches of PCam, in 40 minutes on two cores. The two epochs of all of PCam here are 1.4 times
as many patches, and have not been measured. `lite0.py` starts from ImageNet weights instead, and
gets further in the same time.
"""

from ml_collections import ConfigDict

from bef_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration, with the fields named in `arg` changed."""
    config = default.boosted("b0")
    config.name = "laptop"
    config.epochs = 2.0
    config.model.total_stride = 32
    config.model.drop_path = 0.1
    # 64 of 96 px. min_size is the same, so all windows have one size.
    config.rcc.max_size = config.data.get_ref("patch_size") * 2 // 3
    config.optim.learning_rate = 6e-3  # 1.5e-3 at a batch of 64
    config.optim.warmup_epochs = 0.1
    return default.apply_arg(config, arg)
