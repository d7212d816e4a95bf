"""What is to be scored, whatever it lies in: pictures, folders of them, npz, HDF5 or stores."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bef_jax.data import npz, pcam_hdf5, pictures, store
from bef_jax.data.augment import PATCH
from bef_jax.data.chunk import ranges
from bef_jax.errors import UserError


class Patch(NamedTuple):
    """One patch, and where it was cut from, if it was.

    Attributes:
        id: unique within the input.
        pixels: uint8 [96, 96, 3].
        picture: the larger picture that it is a tile of; None for a patch of its own.
        y: see `pictures.Tile`.
        x: likewise.
    """

    id: str
    pixels: np.ndarray
    picture: Path | None = None
    y: int = 0
    x: int = 0


def check(path: Path, split: str | None) -> None:
    """Looks at all of an input that can be looked at in little time, before anything is compiled.

    Raises:
        UserError: it is missing, or of no kind that can be scored.
    """
    if not path.exists():
        raise UserError(f"--input={path}: no such file or folder")
    if split and not _is_store(path):
        raise UserError(f"--split={split}: only a store has splits, and {path} is none")
    if _is_store(path):
        for name in _splits(path, split):
            store.open_split(path, name)
    # Pictures by their headers; the header of an array is looked at with its first patches.
    elif not _is_array_file(path):
        for file in pictures.find(path):
            pictures.look(file)


def read(path: Path, split: str | None, stride: int) -> Iterator[Patch]:
    """Yields the patches of an input in an order that does not depend on the file system.

    Args:
        path: a picture, a folder of pictures, a .npz with `images`, a .h5 or .h5.gz with `x`, or a
            store.
        split: of a store; all of them without it.
        stride: between the tiles of larger pictures, in pixels.

    Raises:
        UserError: something of it is damaged, or no patch.
    """
    if _is_store(path):
        # A generator: a split is opened when its turn comes.
        opened = (store.open_split(path, name) for name in _splits(path, split))
        yield from itertools.chain.from_iterable(map(_of_split, opened))
    elif _is_array_file(path):
        stream = npz.stream if path.suffix == ".npz" else pcam_hdf5.stream
        for ids, images in stream(path):
            yield from map(Patch, ids.tolist(), images)
    else:
        # Ids start below the input, with slashes: the same wherever the folder lies.
        root = path if path.is_dir() else path.parent
        for file in pictures.find(path):
            yield from _of_picture(file, file.relative_to(root).as_posix(), stride)


def _of_split(split: store.Split) -> Iterator[Patch]:
    images = split.images
    # Read, not mapped: pages of a map stay in memory while there is room, and count as ours.
    with open(images.filename, "rb") as file:
        file.seek(images.offset)
        for rows in ranges(len(split)):
            shape = (rows.stop - rows.start, *images.shape[1:])
            # [n, 96, 96, 3], 13.5 MiB at most.
            block = np.fromfile(file, np.uint8, math.prod(shape)).reshape(shape)
            yield from map(Patch, split.ids[rows].tolist(), block)


def _of_picture(file: Path, name: str, stride: int) -> Iterator[Patch]:
    pixels = pictures.read(file)
    if pixels.shape[:2] == (PATCH, PATCH):
        yield Patch(name, pixels)
        return
    for y, x, tile in pictures.tiles(pixels, stride):
        # The path, not the pixels: a heat map reads the picture again, and none waits in memory.
        yield Patch(f"{name}:x={x}:y={y}", tile, file, y, x)


def _is_store(path: Path) -> bool:
    return (path / store.MANIFEST).is_file()


def _is_array_file(path: Path) -> bool:
    # By the whole name: the suffix of .h5.gz is .gz alone.
    return path.is_file() and path.name.endswith((".npz", ".h5", ".hdf5", ".h5.gz"))


def _splits(path: Path, split: str | None) -> list[str]:
    counts = store.read_manifest(path)["counts"]
    return [split] if split else [name for name in store.SPLITS if counts.get(name)]
