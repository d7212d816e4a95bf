"""Keeps measurements, together with what is needed to repeat them.

Each hardware and day has one file, such as amd-epyc-2-cores-2026-11-23.json, with a list of them.
"""

import fcntl
import os
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bef_jax.runtime.files import check_outputs, read_json, write_json
from bef_jax.runtime.versions import installed_versions

# Environment variables that change the speed. For example, a step on CPU clears gigabytes of fresh
# memory, which is cheaper with huge pages.
_SPEED_VARIABLES = ("GLIBC_TUNABLES", "XLA_FLAGS", "LIBTPU_INIT_ARGS")


def results_file(folder: Path, hardware: str) -> Path:
    """Makes `folder`, and returns the path of today's file in it.

    Call it before a measurement, which takes minutes, so that an error comes first.

    Raises:
        UserError: the folder or the file can't be written, or the file does not hold a list.
    """
    # Use only letters, digits and dashes, because every file system takes them.
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    file = folder / f"{slug}-{datetime.now():%Y-%m-%d}.json"
    check_outputs(folder, [file.name], fix="name another --results")
    folder.mkdir(parents=True, exist_ok=True)
    read(file)
    return file


def append(file: Path, summary: dict, argv: Sequence[str]) -> None:
    """Adds an entry to the list in `file`: timestamp, command, environment, versions, summary.

    Args:
        argv: the flags of the command line, after the program's name.

    Raises:
        UserError: the file does not hold a list.
    """
    entry = {
        "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bef_jax.main", *argv]),
        "environment": {name: os.environ[name] for name in _SPEED_VARIABLES if name in os.environ},
        "versions": installed_versions(),
        "summary": summary,
    }
    # Read the file again, because another benchmark may have added an entry in the meantime. If two
    # read it at once, the one that writes first would lose its entry. So lock the folder, and not
    # the file, because write_json replaces the file.
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write_json(file, [*read(file), entry])
    finally:
        os.close(folder)


def read(file: Path) -> list[dict]:
    """Returns the entries of `file`; none if it does not exist.

    Raises:
        UserError: the file does not hold a list.
    """
    # Do not replace a file that can't be read, because it may hold somebody's measurements.
    try:
        return read_json(file, _check, "move it away")
    except FileNotFoundError:
        return []


def _check(entries: Any) -> None:
    if not isinstance(entries, list):
        raise TypeError("it is not a list of results")
