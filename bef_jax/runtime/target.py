"""The kind of hardware that a program is traced for."""

import jax


def for_gpu() -> bool:
    """Returns whether the program that is being traced is for GPUs.

    The mesh says so, not this machine, which may compile for hardware that it does not have.
    Without a mesh (`jax.set_mesh`) the answer is no.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "gpu"
