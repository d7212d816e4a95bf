"""What a measurement ran on: a name for people, and the published peak of an accelerator."""

import os
import platform
from pathlib import Path

import jax

# Dense bfloat16 FLOP/s of one device, by JAX's name for it, as the makers publish them: Google in
# the pages on TPU v4, v5e, v5p and v6e of the Cloud TPU documentation; NVIDIA in the data sheets
# of H100, H200, A100 and L4, whose figures with sparsity are twice these.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    # JAX knows one chip by two names: v5p here, v6e below.
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that a device reaches at best; None where that is not published, or not here."""
    # A TPU puts float32 products together from several of bfloat16, and no peak is published.
    return PEAK_FLOPS.get(device_kind) if dtype == "bfloat16" else None


def describe() -> str:
    """Names all devices: "AMD EPYC, 2 cores" on CPU, else "NVIDIA L4" or "8 x TPU v5 lite"."""
    if jax.default_backend() == "cpu":
        available = cores()
        return f"{cpu_model()}, {available} core{'s' if available > 1 else ''}"
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    return kind if count == 1 else f"{count} x {kind}"


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
