"""Several processes as one run: when they meet, what only the first does, how they part.

JAX finds the others by itself where a launcher tells it (SLURM, Open MPI, Cloud TPU, TPUs on GKE);
here is decided when to ask it, and what a user reads when a host is lost.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint.multihost import get_barrier_sync_fn

from bef_jax.errors import UserError

_WEEK = 7 * 24 * 3600 * 1000  # in ms
AGAIN = "the same command on all hosts goes on from the last checkpoint"


def is_announced(environment: Mapping[str, str]) -> bool:
    """Whether a launcher's variables say that this is one process of several.

    SLURM counts inside a step (srun) alone: in a batch script or a shell of an allocation nobody
    started the other tasks.
    """
    # GKE sets them for a slice of one host as well: it is how many there are that counts.
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
    """The GPUs that SLURM's only task on a node takes: all of the node's.

    JAX gives each task of SLURM one GPU, by its place on the node; None leaves it so.
    """
    # Outside of SLURM both are None, and equal: hence the look at the step's list.
    tasks, nodes = (environment.get(f"SLURM_{name}") for name in ("NTASKS", "JOB_NUM_NODES"))
    gpus = int(environment.get("SLURM_GPUS_ON_NODE", 1))
    alone = "SLURM_STEP_NODELIST" in environment and tasks == nodes
    return list(range(gpus)) if alone and gpus > 1 else None


@contextlib.contextmanager
def initialize(settings: ConfigDict) -> Iterator[None]:
    """Joins the other processes of the run, if there are any; call it before JAX has devices.

    1. `coordinator` is host:port: `num_processes` meet there, this one as `process_id`.
    2. It is auto: JAX finds the address and the numbers; needed on Cloud TPU VMs, whose variables
       do not tell.
    3. It is empty: as auto where the launcher's variables announce several processes, else alone.

    Inside, the loss of another process ends this one within `settings.timeout_seconds`. XLA ends
    it by abort(), which leaves Python no chance to speak, so a shell that waits for our end does.

    Args:
        settings: config.distributed.

    Raises:
        UserError: the settings do not name a place in a group of processes, or none is found.
    """
    if not settings.coordinator and not is_announced(os.environ):
        yield
        return
    seconds = settings.timeout_seconds
    absent = f"failed: not every process of the run has come within {seconds} s; start all of them"
    # JAX ends a process that waited in vain by abort(), too: what it says comes from the shell.
    with _last_words(f"{absent}, or raise config.distributed.timeout_seconds"):
        _connect(settings)
    lost = f"failed: {who()} ends, since it or another one is lost; {AGAIN}"
    # Entered once all are there, so that the two reasons have a line of their own each.
    with _last_words(lost), _stdout_on_stderr():
        yield


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Sends what libraries print elsewhere: Gloo greets on stdout, which the summary alone is."""
    # By descriptors: what C++ prints does not go through sys.stdout.
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def who() -> str:
    """What a message calls this process of several."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def _connect(settings: ConfigDict) -> None:
    seconds, explicit = settings.timeout_seconds, settings.coordinator not in ("", "auto")
    place = {
        "coordinator_address": settings.coordinator,
        "num_processes": settings.num_processes,
        "process_id": settings.process_id,
        "cluster_detection_method": "deactivate",  # a launcher around us may count otherwise
    }
    try:
        jax.distributed.initialize(
            **(place if explicit else {"local_device_ids": node_devices(os.environ)}),
            # One time-out for all three, which the messages can name.
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"config.distributed: {error} Set coordinator (host:port), num_processes and process_id"
        ) from error


@contextlib.contextmanager
def _last_words(text: str) -> Iterator[None]:
    """If the process dies inside, its end of the pipe closes and the shell prints `text`."""
    # read fails at the end of the pipe without a line: that is a death, a line is an end in peace.
    script = 'read -r _ || echo "$0" >&2'
    # A session of its own: a Ctrl-C in the terminal is not for it.
    shell = subprocess.Popen(
        ["sh", "-c", script, text], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        # Where an exception comes by, Python is alive, and tells it itself.
        shell.communicate(b"\n")


def is_first() -> bool:
    """Whether this process writes what the run writes once: process 0, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Lets process 0 run the body before the others do; `name` is the same in all of them."""
    # Each comes to one barrier, the others before the body and process 0 after it. If the body
    # fails in process 0, its end ends those that wait.
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


def wait_for_all(name: str) -> None:
    """Returns once every process has called it with the same `name`, once each.

    Not by a collective: Gloo gives one up after 30 s, and there is no limit here. Who waits for a
    process that is lost is ended like the rest.
    """
    if jax.distributed.is_initialized():
        get_barrier_sync_fn()(key=name, timeout_ms=_WEEK)


def is_stop_agreed(steps: range) -> bool:
    """Whether all processes stop after `steps`, since one of them got SIGTERM.

    JAX passes the notice on in the background, and the processes agree on the first step that none
    of them has asked about. So each must ask about every step, in the same order.
    """
    # any() stops at the agreed step: none of the processes asks about a later one.
    return any(multihost_utils.reached_preemption_sync_point(step) for step in steps)


def leave(status: int) -> int:
    """Returns `status`; a process of several that failed ends here and now instead.

    Python's own end would first wait for the others, which wait for this one.
    """
    if not status or not jax.distributed.is_initialized():
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
