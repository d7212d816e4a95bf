"""sha256 of files: what a store and a checkpoint carry, and are checked against."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from bef_jax.runtime.files import open_user_file

_BLOCK = 1 << 20


def sha256(file: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """Returns the sha256 of a file's content, as hex digits; the file is streamed.

    Args:
        file: a regular file.
        advance: called with the number of bytes of each block that was read.
    """
    digest = hashlib.sha256()
    with open_user_file(file) as stream:
        # No more than it has: a link can lead to a file of the system that has no end.
        left = os.fstat(stream.fileno()).st_size
        while block := stream.read(min(left, _BLOCK)):
            digest.update(block)
            advance(len(block))
            left -= len(block)
    return digest.hexdigest()


def first_damaged(
    folder: Path,
    expected: Mapping[str, str],
    advance: Callable[[int], object] = lambda _: None,
) -> Path | None:
    """Returns the first file, by name, that is missing or has another content, or None.

    Args:
        folder: where the files lie; what a name leads to outside of it counts as missing.
        expected: sha256 by the file's path in `folder`, with forward slashes.
        advance: as for `sha256`.
    """
    # Sorted, so that every try names the same file; those after it are not read.
    for name in sorted(expected):
        file = folder / name
        is_there = _is_inside(name) and os.path.isfile(file)
        if not is_there or sha256(file, advance) != expected[name]:
            return file
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
