"""Checks a configuration: single fields, combinations, and whether the devices can run it."""

import json
import logging
import re

from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.configs import default
from bef_jax.configs.fields import FIELDS, MOST_FLOAT
from bef_jax.data.sources import SOURCES
from bef_jax.errors import UserError
from bef_jax.models import REGISTRY, is_frozen, parameter_paths, stages

LOG = logging.getLogger(__name__)

CHOICES = {name: field.choices for name, field in FIELDS.items() if field.choices}
CHOICES |= {"model.name": tuple(REGISTRY), "data.source": SOURCES}
RANGES = {
    name: (field.least, field.most) for name, field in FIELDS.items() if field.least is not None
}


def as_json(config: ConfigDict) -> dict:
    """Returns a configuration as it is saved: plain dicts, with lists for tuples."""
    return json.loads(config.to_json_best_effort())


def flatten(config: ConfigDict, prefix: str = "") -> dict:
    """Returns {"model.name": ..., ...}: every field of the tree by its dotted name."""
    fields = {}
    for key, value in config.items():
        inner = isinstance(value, ConfigDict)
        fields |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return fields


def validate(config: ConfigDict) -> None:
    """Raises `UserError` at the first field that is unknown, missing, mistyped or impossible."""
    # Check the names first, because the other checks look fields up by name.
    fields, known = flatten(config), flatten(default.get_config())
    _check_fields(fields, known)
    for name, choices in CHOICES.items():
        if fields[name] not in choices:
            listed = ", ".join(map(str, choices))
            raise UserError(f"config.{name}={fields[name]!r} is unknown: choose one of {listed}")
    for name, (least, most) in RANGES.items():
        _check_range(name, fields[name], least, most)
    _check_combinations(config)
    # Check this last, and only if it is set: tracing the network takes a second or two.
    if config.optim.freeze:
        _check_freeze(config.optim.freeze, parameter_paths(config.model))


def _check_fields(fields: dict, known: dict) -> None:
    for name in [*fields, *known]:
        if name not in known:
            raise UserError(f"config.{name} is unknown: configs/default.py lists every field")
        if name not in fields:
            raise UserError(f"config.{name} is missing: start from configs/default.py")
        _check_type(name, fields[name], known[name])


def _check_type(name: str, value, default_value) -> None:
    """Raises `UserError` at a wrong type.

    A float accepts an int, and a default of None accepts None or an int.
    """
    # Accept lists for tuples: a saved configuration comes from JSON, which has no tuples.
    kinds = {float: (int, float), tuple: (tuple, list), type(None): (int, type(None))}
    allowed = kinds.get(type(default_value), (type(default_value),))
    # In Python True is an int, so it would be accepted as 1.
    is_flag = isinstance(value, bool) and not isinstance(default_value, bool)
    if is_flag or not isinstance(value, allowed):
        wanted = "int" if default_value is None else type(default_value).__name__
        raise UserError(f"config.{name}={value!r} has the wrong type: it takes {wanted}")


def _check_range(name: str, value, least, most) -> None:
    if value is not None and not least <= value <= most:  # NaN is not in the range
        raise UserError(
            f"config.{name}={value!r} is out of range: give at least {least} and at most {most}"
        )


def _check_combinations(config: ConfigDict) -> None:
    batch = config.batch_size
    # Larger pictures are cut around the center, so it is checked without RCC, too.
    _check_central("center", config)
    if config.rcc.enabled:
        _check_windows(config)
    if config.model.attention_kernel % 2 == 0:
        raise UserError("config.model.attention_kernel is even: choose an odd side")
    if config.steps is None and config.epochs == 0:
        raise UserError("config.epochs is 0 and config.steps is empty: set one of them")
    if config.eval.every_epochs == 0:
        raise UserError("config.eval.every_epochs is 0: give a part of an epoch, such as 0.5")
    if batch % config.optim.accumulate:
        raise UserError(f"config.optim.accumulate must divide batch_size={batch}")
    # Groups are parts of a micro-batch, which passes through the network at once.
    if batch // config.optim.accumulate % config.bn_groups:
        raise UserError("config.bn_groups must divide batch_size / optim.accumulate")
    if config.model.mbconv == "pallas":
        _check_kernels(config)
    for name in ("augment.mean", "augment.std"):
        _check_triple(name, config.augment[name.removeprefix("augment.")])
    _check_ratio(config.data.split_ratio)
    if not all(isinstance(name, str) and name for name in config.data.classes):
        raise UserError(
            f"config.data.classes={tuple(config.data.classes)}: give texts, such as ('0', '1')"
        )
    # Check this after the triples, because only numbers can be compared with 0.
    if min(config.augment.std) <= 0:
        raise UserError("config.augment.std: give three numbers above 0, because they are divisors")
    _check_stages(config.model)


def _check_central(name: str, config: ConfigDict) -> None:
    """Raises `UserError` unless the square of config.rcc.`name` lies in the middle of a patch."""
    value, side = config.rcc[name], config.data.patch_size
    if value > side:
        raise UserError(f"config.rcc.{name}={value} is above data.patch_size={side}: lower it")
    # With an odd difference, the margins on two sides would differ. A center of 0 has none.
    if value and (side - value) % 2:
        fix = f"give an {'odd' if side % 2 else 'even'} side"
        fix += ", or 0 for none" if name == "center" else ""
        raise UserError(
            f"config.rcc.{name}={value} can't lie in the middle of data.patch_size={side}: {fix}"
        )


def _check_windows(config: ConfigDict) -> None:
    rcc, side = config.rcc, config.data.patch_size
    _check_central("eval_size", config)
    if rcc.max_size > side:
        raise UserError(
            f"config.rcc.max_size={rcc.max_size} is above data.patch_size={side}: lower it"
        )
    if rcc.min_size > rcc.max_size:
        raise UserError(
            f"config.rcc.min_size={rcc.min_size} is above rcc.max_size={rcc.max_size}: lower it"
        )
    for name in ("min_size", "eval_size"):
        if rcc[name] < rcc.center:
            raise UserError(
                f"config.rcc.{name}={rcc[name]} is below rcc.center={rcc.center}: raise it, or "
                "lower rcc.center"
            )


def _check_kernels(config: ConfigDict) -> None:
    # Imported here, because Pallas takes 0.1 s that a start without these kernels need not.
    from bef_jax.models.ops.mbconv.grid import check_batch

    if not config.model.name.startswith("efficientnet"):
        raise UserError("config.model.mbconv=pallas is for EfficientNets: choose layers")
    check_batch(config.batch_size, config.optim.accumulate * config.bn_groups)


def _check_triple(name: str, values, meaning: str = "one per channel") -> None:
    # Compare, because math.isfinite fails at a huge int. The comparison is also False for NaN.
    numbers = all(isinstance(x, (int, float)) and abs(x) <= MOST_FLOAT for x in values)
    if len(values) != 3 or not numbers:
        raise UserError(f"config.{name}={values!r}: give three numbers, {meaning}")


def _check_stages(model: ConfigDict) -> None:
    numbers = range(1, len(stages(model.name)) + 1)
    # Check this without fusion, too, so that a wrong stage is not found only later.
    for stage in model.fusion_stages:
        if stage not in numbers:
            raise UserError(
                f"config.model.fusion_stages={tuple(model.fusion_stages)}: {model.name} has "
                f"stages 1 .. {len(numbers)}"
            )


def _check_freeze(pattern: str, paths: tuple[str, ...]) -> None:
    field = f"config.optim.freeze={pattern!r}"
    try:
        frozen = [path for path in paths if is_frozen(path, pattern)]
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{field} is not a regular expression: {error}") from error
    if not frozen:
        raise UserError(f"{field} matches no parameter: they have names like {paths[0]}")
    if len(frozen) == len(paths):
        raise UserError(f"{field} matches every parameter: leave one to train, such as classifier")


def _check_ratio(ratio) -> None:
    _check_triple("data.split_ratio", ratio, "the shares of train, valid and test")
    if min(ratio) < 0 or sum(ratio) <= 0:
        raise UserError(
            f"config.data.split_ratio={tuple(ratio)}: give three shares of at least 0, not all 0"
        )


# ---- on the devices at hand --------------------------------------------------------------------

# Batch normalisation needs at least this many images for a mean and a variance to train with.
_MIN_IMAGES_PER_GROUP = 16


def check_devices(config: ConfigDict, mesh: Mesh) -> None:
    """Raises `UserError` unless every device gets its part of a batch and can run its program.

    Kernels are only for some chips, and take whole groups. Too few images for batch statistics
    only cause a warning.
    """
    micro_batch = config.batch_size // config.optim.accumulate
    field = "batch_size" if config.optim.accumulate == 1 else "batch_size / optim.accumulate"
    _check_divisible(field, micro_batch, mesh)
    _warn_of_small_groups(micro_batch // config.bn_groups)
    if config.model.mbconv == "pallas":
        _check_kernel_devices(config, mesh)


def _warn_of_small_groups(images: int) -> None:
    if images < _MIN_IMAGES_PER_GROUP:
        LOG.warning(
            "batch statistics over %d images are noisy: raise config.batch_size, or lower "
            "config.bn_groups or config.optim.accumulate, to have %d or more",
            images,
            _MIN_IMAGES_PER_GROUP,
        )


def _check_kernel_devices(config: ConfigDict, mesh: Mesh) -> None:
    from bef_jax.models.ops.mbconv.grid import KERNEL_CHIPS

    device = mesh.devices.flat[0]
    if device.device_kind not in KERNEL_CHIPS:
        raise UserError(
            "config.model.mbconv=pallas is for TPU v5e, v5p and v6e, "
            f"not for {device.device_kind}: choose layers"
        )
    # A kernel takes one group at a time, and computes its statistics on the device that has it.
    _check_divisible("bn_groups", config.bn_groups, mesh)


def _check_divisible(field: str, value: int, mesh: Mesh) -> None:
    if value % mesh.size:
        raise UserError(
            f"config.{field}={value} can't be split over {mesh.size} devices: "
            f"make it a multiple of {mesh.size}"
        )
