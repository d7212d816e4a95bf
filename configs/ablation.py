"""The paper's table: a baseline, each of the four changes alone, all of them, and other networks.

    bef-jax --config=ablation --mode=ablate --config.data.dir=DIR

`ROWS` says what each row changes. The rows can also change any other configuration.
"""

from types import ModuleType

from ml_collections import ConfigDict

from bef_jax.configs import default, densenet121, resnet50


def _network(config_file: ModuleType) -> dict:
    """Returns the fields of config.model in which a comparison network differs from the default."""
    usual, other = default.get_config().model, config_file.get_config().model
    return {f"model.{name}": value for name, value in other.items() if value != usual[name]}


# The baseline sets all four switches, so that a row of one change differs from it in only one.
BASELINE = {
    "rcc.enabled": False,
    "model.total_stride": 32,
    "model.attention": "none",
    "model.fusion": False,
}
_CHANGES = {
    "rcc": {"rcc.enabled": True},
    "rds": {"model.total_stride": 16},
    "attention": {"model.attention": "cbam"},
    "fusion": {"model.fusion": True},
}
_LAYERS = {"model.mbconv": "layers"}  # because kernels exist only for EfficientNets
_ALL = {name: value for change in _CHANGES.values() for name, value in change.items()}
ROWS = {
    "baseline": BASELINE,
    **{name: BASELINE | change for name, change in _CHANGES.items()},
    "all": BASELINE | _ALL,
    "resnet50": BASELINE | _LAYERS | _network(resnet50),
    "densenet121": BASELINE | _LAYERS | _network(densenet121),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration that the rows change, with the fields named in `arg` changed."""
    config = default.boosted("b3")
    config.name = "ablation"
    return default.apply_arg(config, arg)
