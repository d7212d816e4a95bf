"""The devices of this machine: their names and sizes, and what to install where one is unused.

Device nodes tell which hardware a machine has, whatever JAX can use of it.
"""

import importlib.util
import logging
import os
import platform
from pathlib import Path

import jax
import jaxlib

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
    return describe() + (f", {limit / _GIB:.1f} GiB each" if limit else "")


def _host() -> str:
    return f"{_cpu()}, {ram() / _GIB:.1f} GiB"


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


# ---- names and sizes ---------------------------------------------------------------------------


def describe() -> str:
    """Names all devices: "AMD EPYC, 2 cores" on CPU, else "NVIDIA L4" or "8 x TPU v5 lite"."""
    if jax.default_backend() == "cpu":
        return _cpu()
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    return kind if count == 1 else f"{count} x {kind}"


def _cpu() -> str:
    available = cores()
    return f"{cpu_model()}, {available} core{'s' if available > 1 else ''}"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux tells it; elsewhere its architecture, such as arm64."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    # One line per core, all alike: the first that has a name.
    fields = (line.partition(":") for line in lines)
    names = (value.strip() for key, _, value in fields if key.strip() == "model name")
    return next(filter(None, names), platform.machine())


def cores() -> int:
    """Cores that this process may use: a container, or taskset, can allow it fewer than exist."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def ram(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or what its cgroup allows."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(root)])


def _limits(root: Path) -> list[int]:
    """The limits in bytes of the process's cgroup, and of those that it is in; Linux has them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 has one tree for all; version 1 has one for each controller.
        if controllers not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        tree = root / "sys/fs/cgroup" / controllers
        group = tree / path.lstrip("/")
        files = [folder / name for folder in (group, *group.parents) if folder.is_relative_to(tree)]
        texts = [file.read_text().strip() for file in files if file.exists()]
        limits += [int(text) for text in texts if text != "max"]
    return limits
