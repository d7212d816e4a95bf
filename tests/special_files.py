"""What tests put in place of a good file."""

import os
import stat
from pathlib import Path

import pytest

BRACKETS = pytest.param("[" * 100_000, id="100000 brackets")  # JSON too deep for a parser
MAKERS = {
    "FIFO": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to a folder": lambda path: path.symlink_to(path.parent),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


def make_special(kind, path):
    """Puts something that is not a regular file at `path`, in place of a file; returns `path`."""
    path.unlink(missing_ok=True)
    MAKERS[kind](path)
    return path
