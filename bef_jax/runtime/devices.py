"""The devices of this machine: their names and sizes, and what to install if one is unused.

Device nodes show which hardware a machine has, even if JAX cannot use it.
"""

import importlib.util
import logging
import os
import platform
from pathlib import Path

import jax
import jaxlib

from bef_jax.errors import RunError, install_command, one_line

LOG = logging.getLogger(__name__)

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # JAX's, for CUDA 12 and 13
# Containers are given the second. The last is from Windows' subsystem for Linux.
_NVIDIA = ("dev/nvidia0", "dev/nvidiactl", "proc/driver/nvidia", "dev/dxg")
_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
_GIB = 2**30


def report(initialize: bool = True, root: Path = Path("/")) -> None:
    """Logs what the run computes on, and warns if an accelerator is there but not used.

    Args:
        initialize: whether JAX may be asked for its devices, which takes an accelerator's memory.
            If not, the line describes only the machine.
        root: the folder below which device nodes are looked for.

    Raises:
        RunError: JAX can't use the devices that it was installed for.
    """
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    if not initialize:
        LOG.info("running on %s (%s)", _host(), versions)
        return
    backend = _backend()
    LOG.info("running on %s (%s, %s)", _devices(backend), backend, versions)
    # A user who asked JAX for the CPU gets no advice.
    if backend == "cpu" and not jax.config.jax_platforms and (unused := advice(root)):
        LOG.warning(unused)


def _backend() -> str:
    try:
        return jax.default_backend()
    except RuntimeError as error:
        raise RunError(f"JAX can't start: {one_line(error)}") from error


def _devices(backend: str) -> str:
    """Returns the devices of the whole run, with the memory of each."""
    if backend == "cpu":
        # A user can tell XLA to cut a CPU into several devices.
        count = jax.device_count()
        return _host() + (f", as {count} devices" if count > 1 else "")
    # This is less than the chip has, because JAX leaves a part to others. Some plug-ins omit it.
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return describe() + (f", {limit / _GIB:.1f} GiB each" if limit else "")


def _host() -> str:
    return f"{_cpu()}, {ram() / _GIB:.1f} GiB"


def advice(root: Path = Path("/")) -> str | None:
    """Returns what to do about an accelerator that JAX does not use; None if there is none."""
    if node := nvidia_node(root):
        plugin = next(filter(importlib.util.find_spec, CUDA_PLUGINS), None)
        if plugin is None:
            fix = install_command("cuda")
            return f"an NVIDIA GPU ({node}) is in this machine, but JAX computes on the CPU: {fix}"
        # JAX has already logged why the plug-in can't use the GPU.
        return (
            f"an NVIDIA GPU ({node}) is in this machine, but JAX computes on the CPU: the plug-in "
            f"{plugin} is installed; read JAX's reason above, and see whether nvidia-smi works"
        )
    # If libtpu can't use the TPU, JAX does not start, so that case needs no advice.
    if node := tpu_node(root):
        fix = install_command("tpu")
        return f"a TPU ({node}) is in this machine, but JAX computes on the CPU: {fix}"
    return None


def nvidia_node(root: Path) -> Path | None:
    """Returns a file that NVIDIA's driver makes; None if there is none."""
    return next(filter(Path.exists, (root / name for name in _NVIDIA)), None)


def tpu_node(root: Path) -> Path | None:
    """Returns a file that the driver of a TPU makes; None if there is none."""
    first = root / "dev/accel0"
    if first.exists():
        return first
    # Newer TPUs come through VFIO. So does any device that is passed on, so the vendor on the bus
    # must be Google too.
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    if any(vendor.read_text().strip() == _GOOGLE for vendor in vendors):
        return next((path for path in root.glob("dev/vfio/*") if path.name.isdigit()), None)
    return None


# ---- names and sizes ---------------------------------------------------------------------------


def describe() -> str:
    """Returns all devices in words: "AMD EPYC, 2 cores", "NVIDIA L4" or "8 x TPU v5 lite"."""
    if jax.default_backend() == "cpu":
        return _cpu()
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    return kind if count == 1 else f"{count} x {kind}"


def _cpu() -> str:
    available = cores()
    return f"{cpu_model()}, {available} core{'s' if available > 1 else ''}"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the processor's name on Linux; elsewhere its architecture, such as arm64."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    # There is a line for each core, and all are alike: take the first that has a name.
    fields = (line.partition(":") for line in lines)
    names = (value.strip() for key, _, value in fields if key.strip() == "model name")
    return next(filter(None, names), platform.machine())


def cores() -> int:
    """Returns how many cores this process may use; a container or taskset can allow fewer."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def ram(root: Path = Path("/")) -> int:
    """Returns how many bytes of memory this process may use: the machine's, or its cgroup's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(root)])


def _limits(root: Path) -> list[int]:
    """Returns the limits in bytes of the process's cgroup and its parents; only Linux has them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 of cgroups has one tree; version 1 has one for each controller.
        if controllers not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        tree = root / "sys/fs/cgroup" / controllers
        group = tree / path.lstrip("/")
        files = [folder / name for folder in (group, *group.parents) if folder.is_relative_to(tree)]
        texts = [file.read_text().strip() for file in files if file.exists()]
        limits += [int(text) for text in texts if text != "max"]
    return limits
