"""Measurements that are kept, with what it takes to repeat them.

One file per hardware and day, such as amd-epyc-2-cores-2026-11-23.json, holds a list of them.
"""

import fcntl
import os
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bef_jax.runtime.files import check_outputs, read_json, write_json

# Huge pages, for one, make the gigabytes of fresh memory cheaper that a step on CPU clears.
_DECIDING = ("GLIBC_TUNABLES", "XLA_FLAGS", "LIBTPU_INIT_ARGS")  # of speed


def results_file(folder: Path, hardware: str) -> Path:
    """Names today's file in `folder`, which is made; a measurement takes minutes, so this is first.

    Raises:
        UserError: the folder or the file can't be written, or what is in the file is no list.
    """
    # Letters, digits and dashes, which every file system takes.
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    file = folder / f"{slug}-{datetime.now():%Y-%m-%d}.json"
    check_outputs(folder, [file.name], fix="name another --results")
    folder.mkdir(parents=True, exist_ok=True)
    _read(file)
    return file


def append(file: Path, summary: dict, argv: Sequence[str]) -> None:
    """Adds an entry to the list in `file`: timestamp, command, environment, versions, summary.

    Args:
        argv: the flags of the command line, after the program's name.

    Raises:
        UserError: what is in the file is no list.
    """
    entry = {
        "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bef_jax.main", *argv]),
        "environment": {name: os.environ[name] for name in _DECIDING if name in os.environ},
        "versions": versions(),
        "summary": summary,
    }
    # Read again: minutes have passed, and another benchmark may have added its own. Locked, since
    # of two that read at once, the one that writes first would lose its entry.
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write_json(file, [*_read(file), entry])
    finally:
        os.close(folder)


def versions() -> dict[str, str]:
    """Versions of what decides speed."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return packages | {"python": platform.python_version()}


def _read(file: Path) -> list[dict]:
    # Not begun afresh: what can't be read may be somebody's measurements.
    try:
        return read_json(file, _check, "move it away")
    except FileNotFoundError:
        return []


def _check(entries: Any) -> None:
    if not isinstance(entries, list):
        raise TypeError("no list of results")
