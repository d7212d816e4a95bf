"""Settings of glibc's memory allocator, which make training on some CPUs faster.

What they gain, and where nothing, is in results/README.md.

They are read when a process starts. So a program that wants them starts itself again, once, before
it imports JAX. Nothing but a program does that: importing the package changes no setting.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
_LARGEST = 2**30  # bytes of an array that stays in the process when it is freed


def restart() -> None:
    """Starts the program again with the settings, unless they are there.

    The process keeps its id, its arguments and its open files, so that signals reach it as before.
    It returns at once where a user has set the variable, and where the C library is not glibc.
    """
    if VARIABLE in os.environ or not _has_glibc():
        return
    # What Python was given, -m and -P included; sys.argv has lost those.
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {VARIABLE: settings(_cores())})  # noqa: S606


def settings(cores: int) -> str:
    """The variable's value for a process that has so many cores."""
    # Huge pages, since a step clears gigabytes that are new to it, which with small pages can take
    # longer than the arithmetic. Few heaps, which keep what is below 1 GiB from one step to the
    # next, so that less is new; keeping more would take three times the memory. More than one heap,
    # because what the compiler leaves behind lies between the arrays, and a run that compiled would
    # take half as long again.
    values = {
        "hugetlb": 1,
        "arena_max": cores + 1,
        "mmap_threshold": _LARGEST,
        "trim_threshold": _LARGEST,
    }
    return ":".join(f"glibc.malloc.{name}={value}" for name, value in values.items())


def _has_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS and musl, in this order
        return False


def _cores() -> int:
    return len(os.sched_getaffinity(0))  # as Linux has it, and glibc is there
