"""Hardware by its name, such as `v5e:2x4`, `h100:8` or `cpu:8`; it need not be in this machine.

JAX compiles for a TPU slice through libtpu and for a GPU node through the CUDA plug-in. Neither
needs the hardware. A CPU's devices are this machine's own, as many as asked for.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Collection
from importlib import resources

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from bef_jax.errors import UserError, install_command
from bef_jax.planning import chips
from bef_jax.planning.chips import Chip
from bef_jax.runtime import sharding
from bef_jax.runtime.devices import CUDA_PLUGINS

NODE = 8  # the most GPUs that NVLink, or one host, connects
_EXAMPLES = "v5e:2x4, v5e:16x16, v4:2x2x1, v5p:2x2x1, v6e:2x4, h100:8, a100:8, l4:1, cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, a node or this machine.

    Attributes:
        name: as the user wrote it.
        chip: the kind of each device.
        shape: devices along each axis of a slice, or their number.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]


def parse(name: str) -> Topology:
    """Reads `<chip>:<shape>`; the shape is AxB or AxBxC for TPU slices, else a number.

    Raises:
        UserError: the chip is unknown, or does not come in this shape.
    """
    # Refuse leading zeros and zero, because only the compiler would refuse 2x04 or 2x0.
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    chip = chips.by_name(match[1]) if match else None
    if chip is None:
        raise UserError(f"--topology={name!r} is unknown: write one like {_EXAMPLES}")
    shape = tuple(map(int, match[2].split("x")))
    # A slice is a grid, so it needs a shape; a node's GPUs are all alike, so a number is enough.
    if (len(shape) > 1) != (chip.platform == "tpu"):
        wanted = "a shape, such as 2x4" if chip.platform == "tpu" else "a number"
        raise UserError(f"--topology={name}: {chip.name} takes {wanted}")
    if chip.platform == "cuda" and shape[0] > NODE:
        raise UserError(f"--topology={name}: a node has 1 to {NODE} GPUs")
    return Topology(name, chip, shape)


def make_mesh(topology: Topology) -> Mesh:
    """Returns the mesh that training would make on the topology's devices.

    Call it before JAX is used for anything else. It keeps JAX from using an accelerator of this
    machine, and a CPU can be split only before JAX has made its devices.

    Raises:
        UserError: the compiler is not installed, or does not know the shape.
    """
    jax.config.update("jax_platforms", "cpu")
    find = {"cpu": _cpu_devices, "tpu": _tpu_devices, "cuda": _cuda_devices}
    devices = find[topology.chip.platform](topology)
    return Mesh(np.array(devices), (sharding.AXIS,), axis_types=(AxisType.Auto,))


def _cpu_devices(topology: Topology) -> list[jax.Device]:
    # This is an error once JAX has made its devices.
    jax.config.update("jax_num_cpu_devices", topology.shape[0])
    return jax.devices()


def _tpu_devices(topology: Topology) -> list[jax.Device]:
    _require(["libtpu"], install_command("plan"), topology)
    # No TPU is used, so do not ask a metadata server for one, or wait until one is free.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # any value; it silences a warning
    # As on the hardware, one device is one chip, which has two cores in v4.
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        return topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--topology={topology.name}: libtpu refuses it: {reason}") from error


def _cuda_devices(topology: Topology) -> list[jax.Device]:
    _require(CUDA_PLUGINS, install_command("cuda"), topology)
    name = topology.chip.name
    folder = resources.files("bef_jax.planning") / "gpu_targets"
    target = (folder / f"{name}.textproto").read_text()
    shape = f"1x1x{topology.shape[0]}"  # partitions x hosts of each x GPUs of a host
    return topologies.get_topology_desc(name, "cuda", target_config=target, topology=shape).devices


def _require(modules: Collection[str], install: str, topology: Topology) -> None:
    """Raises `UserError` unless one of the modules is installed."""
    if not any(map(importlib.util.find_spec, modules)):
        names = " or ".join(modules)
        raise UserError(
            f"--topology={topology.name} needs {names}, which is not installed: {install}"
        )
