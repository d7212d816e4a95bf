"""Pictures in a folder for each class: DIR/CLASS/*, or DIR/{train,valid,test}/CLASS/*.

Pictures may also lie in folders below that of their class.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.chunk import Begin, Contents, silent
from bef_jax.data.sources.listing import (
    LISTED,
    divide,
    evenly,
    group_finder,
    listed_identity,
    order_classes,
    split_folders,
)
from bef_jax.errors import UserError, listed
from bef_jax.runtime.files import check_regular, user_path

if TYPE_CHECKING:
    from bef_jax.data.sources.decode import Listed

LOG = logging.getLogger(__name__)

DESCRIPTION = LISTED
identity = listed_identity


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source: lists all pictures, and looks at the header of the first one.

    Raises:
        UserError: the folders are not as above, a class is empty, a picture has no group or is no
            regular file, or the first picture is refused.
    """
    from bef_jax.data.sources import decode

    root = user_path(data.dir)
    folders = _class_folders(root)
    found = {name for names in folders.values() for name in names}
    classes = order_classes(found, data.classes, str(root))
    numbers = {name: number for number, name in enumerate(classes)}
    group_of = group_finder(data.group) if data.group else None
    rows: list[Listed] = []
    given: dict[str | None, range] = {}
    for split, names in folders.items():
        start = len(rows)
        if split != "train":  # `divide` refuses it there
            _report_absent(split, [name for name in classes if name not in names])
        for name, folder in names.items():
            rows += _pictures(root, folder, numbers[name], group_of)
        given[split] = range(start, len(rows))
    splits = divide(data, rows, None if None in given else given, classes, str(root))
    mixed = {split: _mixed(rows) for split, rows in splits.items()}
    return decode.open_listed(data, mixed, classes, begin)


def _mixed(rows: Sequence["Listed"]) -> list["Listed"]:
    """Returns the pictures of a split in an order of which each part has all classes."""
    places = evenly(np.array([row.label for row in rows]))
    return [rows[row] for row in np.argsort(places, kind="stable")]


# ---- folders ------------------------------------------------------------------------------------


def _class_folders(root: Path) -> dict[str | None, dict[str, str]]:
    """Returns the classes of each split; without splits, those of None.

    Returns:
        For each split, the folder of each class, as its path from `root` with slashes.
    """
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; set config.data.dir to the one that has a folder per class"
        )
    names = _subfolders(root)
    splits = split_folders(root, names)
    if not splits:
        return {None: {name: name for name in names}}
    return {
        split: {name: f"{folder}/{name}" for name in _subfolders(root / folder)}
        for split, folder in splits.items()
    }


def _subfolders(folder: Path) -> list[str]:
    """Returns the names of the folders in `folder`, sorted, without hidden ones and stores.

    Raises:
        UserError: there are none, or pictures lie beside them.
    """
    from bef_jax.data import pictures

    found = pictures.list_folder(folder)
    for name, kind in found:
        if kind != pictures.Kind.FOLDER:
            raise UserError(
                f"{folder / name}: is in no folder of a class; move each picture into a folder "
                "with the name of its class"
            )
    names = [name for name, _ in found if not _is_store(folder / name)]
    if not names:
        raise UserError(
            f"{folder}: has no folders; put the pictures of each class into a folder with its name"
        )
    return names


def _is_store(folder: Path) -> bool:
    # By default, this source's store is in the folder of its pictures. While it is written, its
    # name has an ending, and it has no manifest yet.
    return folder.name.startswith("store_image_folder") or (folder / "manifest.json").is_file()


def _report_absent(split: str | None, names: Sequence[str]) -> None:
    if names:
        LOG.warning("%s has no picture of %d of the classes: %s", split, len(names), listed(names))


# ---- pictures -----------------------------------------------------------------------------------


def _pictures(
    root: Path, folder: str, label: int, group_of: Callable[[str], str] | None
) -> list["Listed"]:
    """Returns the pictures of a class, sorted by their paths.

    Args:
        root: config.data.dir.
        folder: path from there of the class.
        label: number of the class.
        group_of: see `group_finder`; None if there are no groups.

    Raises:
        UserError: there is none, or one that cannot be read or named.
    """
    from bef_jax.data import pictures
    from bef_jax.data.sources.decode import Listed

    rows = []
    for below, is_regular in pictures.walk(root / folder):
        name = f"{folder}/{below}"
        path = f"{root}/{name}"
        if not is_regular:
            _check_link(Path(path))
        _check_text(path, name)
        # Many names share a group, so keep it once.
        rows.append(Listed(path, label, name, group_of and sys.intern(group_of(name))))
    if not rows:
        raise UserError(
            f"{root / folder}: holds no picture ({', '.join(pictures.SUFFIXES)}); "
            "put some there, or remove the folder"
        )
    return rows


def _check_link(path: Path) -> None:
    """Raises UserError if a path leads to no file, or to a FIFO, a device or the like."""
    check_regular(path)
    if not path.exists():
        raise UserError(f"{path}: is a link that leads to no file; remove it")


def _check_text(path: str, name: str) -> None:
    """Raises UserError for a name that no text can hold; it would be the picture's id."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: its name is not UTF-8; give it another one") from error
