"""One run at a time in a workdir."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bef_jax.errors import UserError, reason_of
from bef_jax.runtime import distributed
from bef_jax.runtime.files import check_regular


@contextlib.contextmanager
def held(workdir: Path, name: str = ".lock") -> Iterator[None]:
    """Holds a lock in the workdir while the body runs; only the first process of a run takes it.

    The operating system drops the lock with its owner, so a killed run holds nothing. Without
    it, two runs in one workdir would delete each other's checkpoints, and mix their lines in
    metrics.jsonl.

    Args:
        name: the lock's file. Modes that write other files, such as predict, have their own, so
            that they can read a run that still trains.

    Raises:
        UserError: another run holds the lock, or nothing can be written there.
    """
    # All processes share the workdir, so the others would find the lock of their own run.
    if not distributed.is_first():
        yield
        return
    check_regular(workdir / name)
    # Do not wait, because the other run may take days.
    lock = FileLock(workdir / name, timeout=0)
    fix = "give another --workdir"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{workdir}: another run writes there; wait for it, or {fix}") from error
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({reason_of(error)}); {fix}") from error
    try:
        yield
    finally:
        lock.release()
