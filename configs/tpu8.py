"""A Cloud TPU slice of eight chips, such as v5e-8: like gpu8.py, 256 images per chip.

    export ZONE=...
    bash launch/tpu_vm.sh create
    bash launch/tpu_vm.sh run --config=tpu8 --config.data.dir=DIR

No run with this configuration has been measured.
"""

from ml_collections import ConfigDict

from bef_jax.configs import default, gpu8


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration, with the fields named in `arg` changed."""
    config = gpu8.get_config()
    config.name = "tpu8"
    return default.apply_arg(config, arg)
