"""One GPU: Boosted EfficientNet-B2 in bfloat16.

    bef-jax --config=gpu --config.data.dir=DIR

The training split (7.2 GB) is kept on the GPU if it takes at most half of the memory. If memory is
short, `--config.batch_size=128` halves what a step needs, and the learning rate is scaled with it.
No run with this configuration has been measured.
"""

from ml_collections import ConfigDict

from bef_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration, with the fields named in `arg` changed."""
    config = default.boosted("b2")
    config.name = "gpu"
    config.dtype = "bfloat16"
    config.batch_size = 256
    config.eval.batch_size = 512
    return default.apply_arg(config, arg)
