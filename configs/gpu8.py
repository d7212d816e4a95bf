"""Eight GPUs of one node: Boosted EfficientNet-B2 in bfloat16, 256 images per GPU.

    bef-jax --config=gpu8 --config.data.dir=DIR
    NODES=2 bash launch/slurm.sh --config=gpu8 --config.bn_groups=16

Each GPU computes its own batch statistics, so that none cross devices. So give as many groups as
there are GPUs. No run with this configuration has been measured.
"""

from ml_collections import ConfigDict

from bef_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration, with the fields named in `arg` changed."""
    config = default.boosted("b2")
    config.name = "gpu8"
    config.dtype = "bfloat16"
    config.batch_size = 2048
    config.bn_groups = 8
    config.epochs = 20.0
    config.eval.batch_size = 2048
    # The peak is 5.6e-3. From 2e-3 at a batch of 256, it grows with the square root of the batch,
    # which suits Adam (Malladi et al. 2022). The usual scaling of 2e-3 would give 1.6e-2.
    config.optim.learning_rate = 7e-4
    config.optim.warmup_epochs = 3.0  # 384 steps
    return default.apply_arg(config, arg)
