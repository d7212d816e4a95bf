"""The pictures in a folder, known by their names."""

import enum
import os
from collections.abc import Iterator
from pathlib import Path

from bef_jax.errors import UserError, reason_of

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".webp", ".bmp")


class Kind(enum.Enum):
    """What a name in a folder stands for: OTHER is a link to a file, a FIFO or the like."""

    FOLDER = enum.auto()
    FILE = enum.auto()
    OTHER = enum.auto()


def find(path: Path) -> list[Path]:
    """Returns the pictures at `path`: itself, or all in a folder and the folders below, sorted.

    Raises:
        UserError: there are none, or a folder cannot be listed.
    """
    if not path.is_dir():
        return [path]
    found = [path / name for name, _ in walk(path)]
    if not found:
        raise UserError(f"{path}: holds no picture ({', '.join(SUFFIXES)}); name another --input")
    return found


def walk(folder: Path | str, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[tuple[str, bool]]:
    """Yields the pictures in a folder and those below it, in the order of their sorted names.

    Hidden folders are left out, and links to folders are followed.

    Args:
        folder: where to begin.
        suffixes: of the files that are wanted, in lower case.

    Yields:
        The path of a picture relative to `folder`, with slashes; and whether it is known to be a
        regular file.

    Raises:
        UserError: a folder cannot be listed, or is reached by two ways, such as a loop of links.
    """
    seen: dict[tuple[int, int], str] = {}
    # Use a stack, because folders can lie deeper in each other than Python's calls may.
    levels = [_level(folder, "", seen, suffixes)]
    while levels:
        for name, kind in levels[-1]:
            if kind == Kind.FOLDER:
                levels.append(_level(folder, f"{name}/", seen, suffixes))
                break
            yield name, kind == Kind.FILE
        else:
            levels.pop()


def _level(
    folder: Path | str,
    below: str,
    seen: dict[tuple[int, int], str],
    suffixes: tuple[str, ...],
) -> Iterator[tuple[str, Kind]]:
    """Returns what is right in a folder below `folder`, whose path from there is `below`.

    Args:
        folder: where the walk began.
        below: empty, or with a slash at its end.
        seen: the folders that were listed, by device and inode; this one is added.
        suffixes: see `walk`.
    """
    path = os.path.join(folder, below)
    found = list_folder(path, suffixes)
    facts = os.stat(path)
    other = seen.setdefault((facts.st_dev, facts.st_ino), path)
    if other != path:
        raise UserError(f"{path}: is the same folder as {other}; remove the link")
    return ((below + name, kind) for name, kind in found)


def list_folder(folder: Path | str, suffixes: tuple[str, ...] = SUFFIXES) -> list[tuple[str, Kind]]:
    """Returns the names of the folders and pictures right in a folder, sorted.

    Pictures are known by their suffix; none is opened. Hidden files and folders are left out: macOS
    keeps its notes on NAME.png in ._NAME.png.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            found = [
                (entry.name, _kind(entry, suffixes)) for entry in entries if entry.name[0] != "."
            ]
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({reason_of(error)}); make it readable"
        ) from error
    return sorted((name, kind) for name, kind in found if kind)


def _kind(entry: os.DirEntry, suffixes: tuple[str, ...]) -> Kind | None:
    """Returns what an entry is, or None if it is neither a folder nor has a suffix."""
    # The system says these with the name, so that only links need a look of their own.
    if _is_folder(entry):
        return Kind.FOLDER
    if not entry.name.lower().endswith(suffixes):
        return None
    return Kind.FILE if entry.is_file(follow_symlinks=False) else Kind.OTHER


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False
