"""Settings of glibc's memory allocator, which make training on some CPUs faster.

results/README.md says what they gain, and where they gain nothing.

glibc reads them when a process starts. So a program that wants them starts itself again, once,
before it imports JAX. Only a program does that: importing the package changes no setting.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
_KEPT_BYTES = 2**30  # bytes: up to this size, a freed array stays in the process


def restart() -> None:
    """Starts the program again with the settings, unless they are set already.

    The process keeps its id, its arguments and its open files, so signals reach it as before. This
    function only returns if the variable is set, by a user or by an earlier call, or if the C
    library is not glibc.
    """
    if VARIABLE in os.environ or not _has_glibc():
        return
    # orig_argv has everything that Python was given; sys.argv lacks -m and -P.
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {VARIABLE: settings(_cores())})  # noqa: S606


def settings(cores: int) -> str:
    """Returns the variable's value for a process that has this many cores."""
    # Huge pages, because a step clears gigabytes of new memory, and with small pages that can take
    # longer than the arithmetic. Few heaps (arenas), which keep freed arrays below 1 GiB for the
    # next step, so that less of its memory is new. Keeping larger arrays, too, would take three
    # times the memory. More than one heap, because the compiler leaves pieces of memory between the
    # arrays: with one heap, a run that compiled would take half as long again.
    values = {
        "hugetlb": 1,
        "arena_max": cores + 1,
        "mmap_threshold": _KEPT_BYTES,
        "trim_threshold": _KEPT_BYTES,
    }
    return ":".join(f"glibc.malloc.{name}={value}" for name, value in values.items())


def _has_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS and musl, in this order
        return False


def _cores() -> int:
    return len(os.sched_getaffinity(0))  # exists, because glibc means Linux
