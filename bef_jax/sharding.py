"""One mesh axis, `data`, over all devices: the batch is cut along it, the state is everywhere.

The same code runs on one device and on many; a jitted function over a sharded batch computes what
one device would, and XLA adds the collectives.
"""

import logging

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from bef_jax.errors import UserError

LOG = logging.getLogger(__name__)

# Every accelerator holds the state of these networks whole, so the batch alone is cut.
AXIS = "data"
# JAX's names of v5e, v5p and v6e: those before have 16 MiB of vector memory, of those after nothing
# was compiled.
_KERNEL_CHIPS = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")

# Images that batch normalisation needs for a mean and a variance to train with.
_LEAST_GROUP = 16


def make_mesh() -> Mesh:
    """Returns the mesh over all devices of all hosts."""
    # Auto: XLA finds the shardings in between. The default is Explicit axes, by which every
    # operation must be able to say its own.
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, or of a whole split: rows (the first axis) over devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def put_everywhere(array: np.ndarray, mesh: Mesh) -> Array:
    """Copies an array that all processes have to all devices.

    jax.device_put would, with several processes, wait for all of them to compare their copies.
    """
    # Each process fills its own devices, and none asks the others.
    return jax.make_array_from_callback(array.shape, replicated(mesh), lambda index: array[index])


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises `UserError` unless every device gets its part of a batch, and runs what is asked for.

    Kernels are for some chips alone, and take whole groups. Too few images for batch statistics
    are a warning.
    """
    batch = config.batch_size // config.optim.accumulate
    _check_divisible("batch_size", batch, mesh)
    _warn_of_small_groups(batch // config.bn_groups)
    if config.model.mbconv == "pallas":
        _check_kernels(config, mesh)


def _warn_of_small_groups(images: int) -> None:
    if images < _LEAST_GROUP:
        LOG.warning(
            "batch statistics over %d images are noisy: raise config.batch_size, or lower "
            "config.bn_groups or config.optim.accumulate, to have %d or more",
            images,
            _LEAST_GROUP,
        )


def _check_kernels(config: ConfigDict, mesh: Mesh) -> None:
    device = mesh.devices.flat[0]
    if device.device_kind not in _KERNEL_CHIPS:
        raise UserError(
            "config.model.mbconv=pallas is for TPU v5e, v5p and v6e, "
            f"not for {device.device_kind}: choose layers"
        )
    # A kernel sees one group at a time, and takes its statistics on the device that has it.
    _check_divisible("bn_groups", config.bn_groups, mesh)


def _check_divisible(field: str, value: int, mesh: Mesh) -> None:
    if value % mesh.size:
        raise UserError(
            f"config.{field}={value} can't be split over {mesh.size} devices: "
            f"choose a multiple of {mesh.size}"
        )
