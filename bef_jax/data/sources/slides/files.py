"""The files of slides and annotations in a folder, and a checksum that shows a change of them."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from bef_jax.data import pictures
from bef_jax.runtime.files import sha256
from bef_jax.slides.annotations import POLYGONS
from bef_jax.slides.reader import SUFFIXES

_TEXTS = (*POLYGONS, ".csv")


def find_files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yields the files of a folder and those below it with such names, sorted.

    Links to folders are followed, because slides are found behind them, too. Hidden files and those
    of stores are left out.

    Raises:
        UserError: see `pictures.walk`.
    """
    # By default the store lies in the folder of the slides. It has a JSON file.
    is_store = functools.cache(
        lambda below: (
            below.name.startswith("store_slides") or (folder / below / "manifest.json").exists()
        )
    )
    for name, _ in pictures.walk(folder, suffixes):
        below = PurePosixPath(name).parents
        if not any(is_store(each) for each in below[:-1]):  # the last one is `folder` itself
            yield folder / name


def checksum(folders: Iterable[Path]) -> str | None:
    """Returns a checksum of the slides and annotations in folders; None if there are none.

    Of slides and masks the size counts, because reading them can take hours. Of text the content
    does.
    """
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
