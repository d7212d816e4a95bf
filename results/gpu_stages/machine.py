"""The stage `env`: what the machine is, and what it can do."""

import argparse
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata

from gpu_stages import emit

PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint",
    "numpy", "clu", "ml-collections", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas",
    "nvidia-cuda-nvcc", "torch", "timm", "triton",
)  # fmt: skip


def env(options: argparse.Namespace) -> None:
    """Reports versions, devices, and the rates of memory, products and calls."""
    record = {"python": platform.python_version(), "versions": versions()}
    record["programs"] = {name: shutil.which(name) for name in ("nvidia-smi", "ptxas", "nvcc")}
    emit(record)  # before JAX is imported and starts the devices, which can fail or hang
    if record["programs"]["nvidia-smi"]:
        with (options.out / "nvidia_smi.txt").open("w") as file:
            command = ["nvidia-smi", "-q", "-d", "CLOCK,MEMORY,POWER"]
            subprocess.run(command, stdout=file, timeout=20)
    import jax

    record["device"] = jax.devices()[0].device_kind
    emit(record)
    for name, rate in rates(options.tiny):
        record[name] = rate
        emit(record)


def versions() -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def rates(tiny: bool) -> Iterator[tuple[str, float]]:
    """Yields TB/s of a copy, TFLOP/s of a product in bfloat16, and microseconds of a call."""
    import jax
    import jax.numpy as jnp

    from gpu_stages.timing import timed

    n, m = (2**12, 2**8) if tiny else (2**29, 2**13)
    increase, square = jax.jit(lambda x: x + 1), jax.jit(lambda a: a @ a)
    vector = jnp.full(n, 1.5, jnp.bfloat16)
    yield "copy_TBps", 2 * vector.nbytes / timed(increase, vector) / 1e12
    matrix = jax.random.normal(jax.random.key(0), (m, m), jnp.bfloat16)
    yield "matmul_TFLOPs", 2 * m**3 / timed(square, matrix) / 1e12
    yield "call_us", 1e6 * timed(increase, jnp.ones(8), count=200)
