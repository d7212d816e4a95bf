"""The pictures in a folder, known by their names."""

import os
from collections.abc import Iterator
from pathlib import Path

from bef_jax.errors import UserError, reason_of

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".webp", ".bmp")
_FOLDER, _FILE, _OTHER = range(3)


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


def walk(folder: Path | str) -> Iterator[tuple[str, bool]]:
    """Yields the pictures in a folder and those below it, in the order of their sorted names.

    They are known by their suffix; none is opened, and few are looked at. Hidden files and folders
    are left out: macOS keeps its notes on NAME.png in ._NAME.png. Links to folders are followed.

    Yields:
        The path of a picture relative to `folder`, with slashes; and whether it is known to be a
        regular file, not a link, a FIFO or the like.

    Raises:
        UserError: a folder cannot be listed, or is reached by two ways, such as a loop of links.
    """
    seen: dict[tuple[int, int], str] = {}
    # A stack instead of calls, because folders can lie deeper in each other than calls may.
    levels = [iter(_level(folder, "", seen))]
    while levels:
        for name, kind in levels[-1]:
            if kind == _FOLDER:
                levels.append(iter(_level(folder, f"{name}/", seen)))
                break
            yield name, kind == _FILE
        else:
            levels.pop()


def _level(
    folder: Path | str, below: str, seen: dict[tuple[int, int], str]
) -> list[tuple[str, int]]:
    """Returns the folders and pictures right in a folder, sorted, with what each is.

    Args:
        folder: where the search began.
        below: path from there of the folder to list; empty, or with a slash at its end.
        seen: the folders that were listed, by device and inode; this one is added.
    """
    path = os.path.join(folder, below)
    try:
        facts = os.stat(path)
        other = seen.setdefault((facts.st_dev, facts.st_ino), path)
        if other != path:
            raise UserError(f"{path}: is the same folder as {other}; remove the link")
        with os.scandir(path) as entries:
            found = [(below + each.name, _kind(each)) for each in entries if _is_shown(each)]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be listed ({reason_of(error)}); make it readable"
        ) from error
    return sorted(each for each in found if each[1] is not None)


def _is_shown(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".")


def _kind(entry: os.DirEntry) -> int | None:
    """Returns what an entry is, or None if it is neither a folder nor named like a picture."""
    try:
        if entry.is_dir():
            return _FOLDER
    except OSError:  # a loop of links
        pass
    if not entry.name.lower().endswith(SUFFIXES):
        return None
    return _FILE if entry.is_file(follow_symlinks=False) else _OTHER
