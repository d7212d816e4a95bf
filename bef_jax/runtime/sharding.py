"""One mesh axis, `data`, over all devices: it cuts patches, and every device has the whole state.

The same code runs on one device and on many. A jitted function over a sharded batch computes what
one device would compute, and XLA adds the collectives.
"""

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

# Every accelerator can hold the whole state of these networks, so only patches are cut.
AXIS = "data"


def make_mesh() -> Mesh:
    """Returns the mesh over all devices of all hosts."""
    # With Auto axes, XLA finds the shardings in between. With the default, Explicit axes, every
    # operation must be able to give its own.
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def for_gpu() -> bool:
    """Returns whether the program that is being traced is for GPUs.

    The mesh says so, not this machine, which may compile for hardware that it does not have.
    Without a mesh (`jax.set_mesh`) the answer is no.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "gpu"


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the state: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch or a whole split: rows (the first axis) over devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


def put_everywhere(array: np.ndarray, mesh: Mesh) -> Array:
    """Copies an array, which every process must have, to all devices.

    With several processes, jax.device_put would wait for all of them to compare their copies.
    """
    # Each process fills its own devices, and none asks the others.
    return jax.make_array_from_callback(array.shape, replicated(mesh), lambda index: array[index])


def with_sharding(tree: Any, sharding: Sharding) -> Any:
    """Returns the shapes and dtypes of the tree's arrays, each with `sharding`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
