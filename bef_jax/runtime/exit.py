"""The ways in which a run ends: the last line that a user reads, and the exit status.

The status is 0 if all is done, 2 after a mistake of the user's, and 1 after a failure.
"""

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from bef_jax.errors import RunError, UserError, listed, one_line, printable

RESUME_HINT = "run the same command on all hosts; training goes on from its last checkpoint"
_FREE_SPACE = "free some space, and run it again; it goes on from what was saved last"
# Look for these in the text, because what Orbax's threads raise in C++ carries no errno. A disk or
# a shell can limit the size of a file, too.
_DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


def process_name() -> str:
    """Returns the name of this process, one of several, for a message."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def status_of(summary: dict) -> int:
    """Returns 0; or prints a line and returns 1 if a part of the input could not be read."""
    unreadable = summary.get("unreadable")
    if not unreadable:
        return 0
    what, where = "pictures can't be read and got no prediction", "predict_summary.json lists them"
    if summary.get("slides"):
        what = "slides and pictures can't be read, or not in full"
        where = f"{listed([each['file'] for each in unreadable])}; {where} with the reasons"
    first = "{file}: {reason}".format(**unreadable[0])
    line = f"failed: {len(unreadable)} of the {what}; {where}; the first is {first}"
    print(printable(line), file=sys.stderr)
    return 1


def status_after(error: Exception) -> int:
    """Prints why a run failed, and returns the exit status, or ends the process at once.

    Raises:
        Exception: `error` itself, if it is a bug and this is the only process.
    """
    if isinstance(error, UserError):
        return _exit_or_return(2, f"error: {error}")
    if isinstance(error, (FloatingPointError, RunError)):
        return _exit_or_return(1, f"failed: {printable(str(error))}")
    # Look at the text first and at the processes next, because Orbax, JAX and gRPC each have their
    # own kinds of error for a full disk and for a lost host. What is left is a bug.
    if any(sign in str(error) for sign in _DISK_FULL):
        _exit_with_last_line(f"failed: {one_line(error)}; {_FREE_SPACE}")
    if not jax.distributed.is_initialized():
        raise error
    traceback.print_exc()
    hint = f"if the cause is that another process was lost, {RESUME_HINT}"
    return _exit_or_return(1, f"failed: {process_name()}: {one_line(error)}; {hint}")


def _exit_or_return(status: int, line: str) -> int:
    """Prints `line`, then ends this process if it is one of several, else returns `status`.

    Python's normal exit would first wait for the other processes, which wait for this one.
    """
    print(line, file=sys.stderr)
    if not jax.distributed.is_initialized():
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_with_last_line(line: str) -> NoReturn:
    """Ends the process with status 1 and `line` as the last line on stderr.

    Orbax's threads would print their own tracebacks after it, so they lose stderr.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(stderr, f"{line}\n".encode())
    # Python's normal exit would wait for all threads that are not daemons.
    os._exit(1)


@contextlib.contextmanager
def print_if_killed(text: str) -> Iterator[None]:
    """Starts a shell that prints `text` if this process dies while the body runs."""
    # If the process dies, the pipe ends without a line and read fails. A line is a normal end.
    script = 'read -r _ || echo "$0" >&2'
    # The shell has its own session, so that a Ctrl-C in the terminal does not reach it.
    shell = subprocess.Popen(
        ["sh", "-c", script, text], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        # After an exception Python is still alive, and reports it itself.
        shell.communicate(b"\n")
