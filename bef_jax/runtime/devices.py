"""What a run computes on, as its first lines say it, and what to install where a device is unused.

Device nodes tell which hardware a machine has, whatever JAX can use of it.
"""

import importlib.util
import logging
from pathlib import Path

import jax
import jaxlib

from bef_jax import hardware
from bef_jax.errors import RunError

LOG = logging.getLogger(__name__)

# JAX's plug-ins for CUDA 12 and 13, and the extra that installs each.
CUDA_PLUGINS = {"jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13"}
# The second is what containers are given; the last is that of Windows' subsystem for Linux.
_NVIDIA = ("dev/nvidia0", "dev/nvidiactl", "proc/driver/nvidia", "dev/dxg")
_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
_GIB = 2**30


def report(initialize: bool = True, root: Path = Path("/")) -> None:
    """Logs what the run computes on, and a warning where an accelerator is there but not used.

    Args:
        initialize: whether JAX may be asked for its devices, which takes an accelerator's memory.
            Otherwise the line is about the machine alone.
        root: below which device nodes are looked for.

    Raises:
        RunError: JAX can't use the devices that it was installed for.
    """
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    if not initialize:
        LOG.info("running on %s (%s)", _host(), versions)
        return
    backend = _backend()
    LOG.info("running on %s (%s, %s)", _devices(backend), backend, versions)
    # Who asked JAX for the CPU gets no advice.
    if backend == "cpu" and not jax.config.jax_platforms and (unused := advice(root)):
        LOG.warning(unused)


def _backend() -> str:
    try:
        return jax.default_backend()
    except RuntimeError as error:
        raise RunError(f"JAX can't start: {' '.join(str(error).split())}") from error


def _devices(backend: str) -> str:
    """The devices of the whole run, with the memory of each."""
    if backend == "cpu":
        # XLA can be told to cut a CPU into several devices.
        count = jax.device_count()
        return _host() + (f", as {count} devices" if count > 1 else "")
    # Less than the chip has, since JAX leaves a part to others. Some plug-ins don't say.
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return hardware.describe() + (f", {limit / _GIB:.1f} GiB each" if limit else "")


def _host() -> str:
    cores = hardware.cores()
    plural = "s" if cores > 1 else ""
    return f"{hardware.cpu_model()}, {cores} core{plural}, {hardware.ram() / _GIB:.1f} GiB"


def advice(root: Path = Path("/")) -> str | None:
    """What to do where a machine has an accelerator that JAX does not use; None if it has none."""
    here = "is in this machine, but JAX computes on the CPU"
    if node := nvidia_node(root):
        plugin = next(filter(importlib.util.find_spec, CUDA_PLUGINS), None)
        # What a plug-in can't use, JAX has logged by then.
        known = "JAX's reason is above, and nvidia-smi tells whether the driver works"
        reason = f"although {plugin} is installed; {known}" if plugin else _install("cuda")
        return f"an NVIDIA GPU ({node}) {here}: {reason}"
    # A libtpu that can't use the TPU makes JAX refuse to start: nothing is left to advise.
    node = tpu_node(root)
    return f"a TPU ({node}) {here}: {_install('tpu')}" if node else None


def _install(extra: str) -> str:
    return f'pip install "bef_jax[{extra}]", or in a checkout pip install -e ".[{extra}]"'


def nvidia_node(root: Path) -> Path | None:
    """A file that NVIDIA's driver makes; None where there is none."""
    return next(filter(Path.exists, (root / name for name in _NVIDIA)), None)


def tpu_node(root: Path) -> Path | None:
    """A file that the driver of a TPU makes; None where there is none."""
    first = root / "dev/accel0"
    if first.exists():
        return first
    # Newer ones come through VFIO, like any device that is passed on: so the bus is asked, too.
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    if any(vendor.read_text().strip() == _GOOGLE for vendor in vendors):
        return next((path for path in root.glob("dev/vfio/*") if path.name.isdigit()), None)
    return None
