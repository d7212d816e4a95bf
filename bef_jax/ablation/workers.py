"""The workers that train trials at the same time: one accelerator each, or a share of the CPU."""

import os
import subprocess
import sys
from dataclasses import dataclass

from bef_jax.errors import RunError

# A process of its own runs this, because JAX takes the accelerators' memory, which trials need.
_REPORT_DEVICES = """
import jax
from bef_jax.runtime import devices, logs
logs.set_up()
devices.report()
print(jax.default_backend(), jax.local_device_count())
"""
# Makes one TPU chip a topology: https://docs.jax.dev, "running multiple JAX processes on a host".
_ONE_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}


@dataclass(frozen=True)
class Worker:
    """A part of the machine, which trains one trial at a time.

    Attributes:
        variables: environment variables that show a process only its part of the machine.
        cores: the cores that its process may run on; empty for all.
    """

    variables: tuple[tuple[str, str], ...] = ()
    cores: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Returns this process's environment, changed for a process of this worker."""
        return {**os.environ, **dict(self.variables)}

    def pin(self, process: int) -> None:
        """Keeps a process, given by its id, on the cores; call this before it counts its cores."""
        if self.cores:
            os.sched_setaffinity(process, self.cores)


def find_workers(jobs: int | None) -> list[Worker]:
    """Returns the workers of this machine.

    Args:
        jobs: how many; by default one per accelerator, or one on CPU. There are never more than
            accelerators or cores.

    Raises:
        RunError: JAX can't start, for example because a GPU's driver is broken.
    """
    answer = subprocess.run([sys.executable, "-c", _REPORT_DEVICES], capture_output=True, text=True)
    if answer.returncode:
        # A process that the system has killed says nothing.
        reason = answer.stderr.strip().splitlines() or [f"it ended with {answer.returncode}"]
        raise RunError(f"JAX finds no device: {reason[-1]}")
    sys.stderr.write(answer.stderr)  # the devices, and JAX's warnings
    backend, count = answer.stdout.split()[-2:]
    if backend == "cpu":
        return _shares(jobs or 1)
    return _accelerators(backend, int(count))[:jobs]


def _accelerators(backend: str, count: int) -> list[Worker]:
    if backend == "tpu":
        chips = [{"TPU_VISIBLE_CHIPS": str(chip)} | _ONE_CHIP for chip in range(count)]
        return [Worker(tuple(chip.items())) for chip in chips]
    # Keep the given names, because this process may see only some of the machine's GPUs.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(gpu) for gpu in range(count)]
    return [Worker((("CUDA_VISIBLE_DEVICES", name),)) for name in names]


def _shares(jobs: int) -> list[Worker]:
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):  # macOS has no way to choose cores
        return [Worker()]
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(jobs, len(cores))
    return [Worker(cores=tuple(cores[share::jobs])) for share in range(jobs)]
