"""One mesh axis, `data`, over all devices: the batch is cut along it, the state is everywhere.

The same code runs on one device and on many; a jitted function over a sharded batch computes what
one device would, and XLA adds the collectives.
"""

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Every accelerator holds the state of these networks whole, so the batch alone is cut.
AXIS = "data"


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
