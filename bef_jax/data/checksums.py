"""sha256 of files: what a store and a checkpoint carry, and are checked against."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def sha256(file: Path) -> str:
    """Returns the sha256 of a file's content, as hex digits; the file is streamed."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def first_damaged(folder: Path, expected: Mapping[str, str]) -> Path | None:
    """Returns the first file, by name, that is missing or has another content, or None.

    Args:
        folder: where the files lie.
        expected: sha256 by the file's path in `folder`, with forward slashes.
    """
    # Sorted, so that every try names the same file; those after it are not read.
    for name in sorted(expected):
        file = folder / name
        if not file.is_file() or sha256(file) != expected[name]:
            return file
    return None
