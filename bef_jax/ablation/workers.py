"""Places for runs that train at the same time: an accelerator each, or a share of the CPU."""

import os
import subprocess
import sys
from dataclasses import dataclass

from bef_jax.errors import RunError

# JAX is asked in a process of its own: whoever asks takes the accelerators' memory, which is the
# runs' to take.
_ASK = """
import jax
from bef_jax.runtime import devices, logs
logs.set_up()
devices.report()
print(jax.default_backend(), jax.local_device_count())
"""
# A TPU chip as a whole topology: https://docs.jax.dev, "running multiple JAX processes on a host".
_ONE_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}


@dataclass(frozen=True)
class Slot:
    """One place.

    Attributes:
        variables: environment variables that show a process its part of the machine alone.
        cores: that a process there may run on; empty for all.
    """

    variables: tuple[tuple[str, str], ...] = ()
    cores: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """This process's environment, changed for one that is to run there."""
        return {**os.environ, **dict(self.variables)}

    def pin(self, process: int) -> None:
        """Keeps the process with this id on the place's cores; at once, before it counts them."""
        if self.cores:
            os.sched_setaffinity(process, self.cores)


def find(jobs: int | None) -> list[Slot]:
    """The places of this machine.

    Args:
        jobs: how many; without it one per accelerator, and one on CPU. Never more than there are
            accelerators, or cores.

    Raises:
        RunError: JAX can't be started, such as where a GPU's driver is broken.
    """
    answer = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
    if answer.returncode:
        raise RunError(f"JAX finds no device: {answer.stderr.strip().splitlines()[-1]}")
    sys.stderr.write(answer.stderr)  # which devices there are, and what JAX warns of
    backend, count = answer.stdout.split()[-2:]
    if backend == "cpu":
        return _shares(jobs or 1)
    return _accelerators(backend, int(count))[:jobs]


def _accelerators(backend: str, count: int) -> list[Slot]:
    if backend == "tpu":
        chips = [{"TPU_VISIBLE_CHIPS": str(chip)} | _ONE_CHIP for chip in range(count)]
        return [Slot(tuple(chip.items())) for chip in chips]
    # Those that this process sees may be some of the machine's.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(gpu) for gpu in range(count)]
    return [Slot((("CUDA_VISIBLE_DEVICES", name),)) for name in names]


def _shares(jobs: int) -> list[Slot]:
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):  # macOS lets nobody choose cores
        return [Slot()]
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(jobs, len(cores))
    return [Slot(cores=tuple(cores[share::jobs])) for share in range(jobs)]
