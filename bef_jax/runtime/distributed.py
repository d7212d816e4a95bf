"""Several processes as one run: how they meet, what only the first does, and when all stop.

JAX finds the other processes by itself under SLURM, Open MPI, TPUs on GKE, and on Cloud TPU VMs.
This module decides when to ask JAX, and what a user reads when a host is lost.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint.multihost import get_barrier_sync_fn

from bef_jax.errors import UserError
from bef_jax.runtime.exit import RESUME_HINT, print_if_killed, process_name

_WEEK = 7 * 24 * 3600 * 1000  # in ms


def is_announced(environment: Mapping[str, str]) -> bool:
    """Returns whether a launcher's variables say that this is one process of several.

    SLURM counts only inside a step (srun): in a batch script or a shell of an allocation, nobody
    has started the other tasks.
    """
    # GKE sets these for a slice of one host as well, so count the hosts.
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    in_step = "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment
    counts = [
        len((workers or "").split(",")),
        environment.get("SLURM_NTASKS", 1) if in_step else 1,
        environment.get("OMPI_COMM_WORLD_SIZE", 1),
        environment.get("MEGASCALE_NUM_SLICES", 1),
    ]
    return any(int(count) > 1 for count in counts)


def node_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the numbers of all GPUs of the node, if SLURM runs one task on each node.

    Otherwise it returns None, which keeps JAX's default: each task gets one GPU, by its place on
    the node.
    """
    if "SLURM_STEP_NODELIST" not in environment:
        return None
    is_alone = environment.get("SLURM_NTASKS") == environment.get("SLURM_JOB_NUM_NODES")
    gpus = int(environment.get("SLURM_GPUS_ON_NODE", 1))
    return list(range(gpus)) if is_alone and gpus > 1 else None


@contextlib.contextmanager
def initialize(settings: ConfigDict) -> Iterator[None]:
    """Joins the other processes of the run, if there are any; call it before JAX has devices.

    1. `coordinator` is host:port: `num_processes` meet there, and this one has `process_id`.
    2. It is auto: JAX finds the address and the numbers. Cloud TPU VMs need this, because their
       variables do not announce a run.
    3. It is empty: as auto if the launcher's variables announce several processes; otherwise this
       process runs alone.

    While the body runs, the loss of another process ends this one within
    `settings.timeout_seconds`. XLA ends it by abort(), after which Python can print nothing. So a
    shell waits for the end of this process and prints the reason.

    Args:
        settings: config.distributed.

    Raises:
        UserError: the settings give this process no place among the others, or JAX finds none.
    """
    if not settings.coordinator and not is_announced(os.environ):
        yield
        return
    seconds = settings.timeout_seconds
    absent = f"failed: not every process of the run joined within {seconds} s; start all of them"
    # JAX also calls abort() in a process that waited too long, so the shell prints this as well.
    with print_if_killed(f"{absent}, or raise config.distributed.timeout_seconds"):
        _connect(settings)
    lost = f"failed: {process_name()} ends, because it or another process is lost; {RESUME_HINT}"
    # This begins when all processes are there, so that each of the two reasons has its own line.
    with print_if_killed(lost), _stdout_on_stderr():
        yield


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Sends stdout to stderr, because Gloo prints a greeting and stdout is for the summary only."""
    # Swap the descriptors, because C++ does not print through sys.stdout.
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _connect(settings: ConfigDict) -> None:
    seconds, explicit = settings.timeout_seconds, settings.coordinator not in ("", "auto")
    place = {
        "coordinator_address": settings.coordinator,
        "num_processes": settings.num_processes,
        "process_id": settings.process_id,
        "cluster_detection_method": "deactivate",  # because a launcher may number them differently
    }
    try:
        jax.distributed.initialize(
            **(place if explicit else {"local_device_ids": node_devices(os.environ)}),
            # All three have one time-out, so that the messages can name it.
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"config.distributed: {error} Set coordinator (host:port), num_processes and process_id"
        ) from error


def is_first() -> bool:
    """Returns whether this process writes for the whole run: it is process 0, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Lets process 0 run the body before the others; `name` must be the same in all of them."""
    # The others wait at the barrier before the body, and process 0 comes to it after the body. If
    # the body fails in process 0, the end of process 0 also ends those that wait.
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


def wait_for_all(name: str) -> None:
    """Returns once every process has called it with the same `name`, once each.

    It does not use a collective, because Gloo gives up after 30 s, and here the wait has no such
    limit. If a process is lost, those that wait for it are ended like the rest.
    """
    if jax.distributed.is_initialized():
        get_barrier_sync_fn()(key=name, timeout_ms=_WEEK)


def is_stop_agreed(steps: range) -> bool:
    """Returns whether all processes stop after `steps`, because one of them got SIGTERM.

    JAX tells the others in the background. The processes then agree on the first step that none of
    them has asked about. So each must ask about every step, in the same order.
    """
    # any() stops at the agreed step, so no process asks about a later one.
    return any(multihost_utils.reached_preemption_sync_point(step) for step in steps)
