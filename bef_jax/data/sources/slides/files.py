"""The files of slides and annotations in a folder, and a checksum that shows a change of them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from bef_jax.data import pictures
from bef_jax.runtime.files import sha256, user_path
from bef_jax.slides.annotations import POLYGONS
from bef_jax.slides.reader import SUFFIXES

_TEXTS = (*POLYGONS, ".csv")


def find_files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yields the files of a folder and those below it with such names, sorted.

    Hidden ones and those of stores are left out.
    """
    for where, folders, names in os.walk(folder):
        if where != str(folder) and _is_store(where, names):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and name.lower().endswith(suffixes):
                yield Path(where, name)


def _is_store(where: str, names: Sequence[str]) -> bool:
    # By default the store lies in the folder of the slides. It has a JSON file.
    return os.path.basename(where).startswith("store_slides") or "manifest.json" in names


def checksum(data: ConfigDict) -> str | None:
    """Returns a checksum of the slides and annotations; None if there are none.

    Of slides and masks the size counts, because reading them can take hours. Of text the content
    does.
    """
    given = dict.fromkeys(filter(None, (data.dir, data.annotations)))
    folders = [folder for each in given if (folder := user_path(each)).is_dir()]
    if not folders:
        return None
    digest, count = hashlib.sha256(), 0
    for folder in folders:
        for path in find_files(folder, _TEXTS + SUFFIXES + pictures.SUFFIXES):
            fact = sha256(path) if path.name.lower().endswith(_TEXTS) else _size(path)
            digest.update(repr((path.relative_to(folder).as_posix(), fact)).encode())
            count += 1
    return digest.hexdigest() if count else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # a link that leads nowhere
        return None
