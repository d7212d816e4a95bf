"""Finds slides, and reads the patches to be scored from pictures, folders, npz, HDF5 or stores."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bef_jax.data import pictures, store
from bef_jax.data.patch import SPLITS, Tiling, same_scale
from bef_jax.data.sources import hdf5, npz
from bef_jax.data.stored.rows import blocks
from bef_jax.errors import UserError, printable
from bef_jax.slides.reader import find_slides, is_result

LOG = logging.getLogger(__name__)


class Patch(NamedTuple):
    """One patch, and its place in a larger picture if it was cut from one.

    Attributes:
        id: unique within the input; for a store, only within its split.
        pixels: uint8 [S, S, 3].
        picture: the larger picture that it is a tile of, or None.
        y: see `pictures.Tile`.
        x: see `pictures.Tile`.
    """

    id: str
    pixels: np.ndarray
    picture: Path | None = None
    y: int = 0
    x: int = 0


def divide(
    path: Path,
    split: str | None,
    side: int,
    mpp: float | None = None,
    slide_mpp: float | None = None,
) -> tuple[list[tuple[str, Path]], list[Path] | None]:
    """Divides an input into slides, which are read block by block, and pictures.

    Args:
        path: see `read`.
        split: see `read`.
        side: of the network's patches, in pixels.
        mpp: micrometres per pixel of the network.
        slide_mpp: micrometres per pixel of the slides' largest levels, if the user says them.

    Returns:
        Names and files of the slides, as `find_slides` returns them, and the pictures; None
        for an input that holds neither, such as a store.

    Raises:
        UserError: a folder cannot be listed, or has only results of a prediction.
    """
    if split or not path.exists() or _is_store(path) or _is_array_file(path):
        return [], None
    slides = find_slides(path, side, mpp, slide_mpp)
    files = [path]
    if path.is_dir():
        found = [path / name for name, _ in pictures.walk(path)]
        files = [file for file in found if not is_result(file)]
        if found and not files and not slides:
            raise UserError(f"--input={path}: has only results of --mode=predict; name another")
    chosen = {file for _, file in slides}
    return slides, [file for file in files if file not in chosen]


def check(
    path: Path,
    split: str | None,
    side: int,
    mpp: float | None = None,
    lenient: bool = False,
    only: Sequence[Path] | None = None,
) -> None:
    """Checks all of an input that can be checked in little time, before anything is compiled.

    Args:
        path: see `read`.
        split: see `read`.
        side: of the network's patches, in pixels.
        mpp: micrometres per pixel of the network; pictures that say another scale are refused.
        lenient: one readable picture of a folder is enough.
        only: see `read`.

    Raises:
        UserError: it is missing, or of a kind that cannot be scored.
    """
    if not path.exists():
        raise UserError(f"--input={path}: no such file or folder")
    if split and not _is_store(path):
        raise UserError(f"--split={split}: only a store has splits; {path} is not one")
    if _is_store(path):
        _check_kind(path, side, mpp)
        for name in _splits(path, split):
            store.open_split(path, name)
    elif _is_array_file(path):
        # Read its first patches, except from a .gz, because unpacking takes minutes.
        if path.suffix != ".gz":
            next(_arrays(path, side))
    else:
        _check_pictures(pictures.find(path) if only is None else only, side, mpp, lenient)


def _check_kind(path: Path, side: int, mpp: float | None) -> None:
    """Checks that the patches of a store have the network's side and scale."""
    manifest = store.read_manifest(path)
    found, own = manifest["patch_size"], manifest["mpp"]
    if found != side:
        raise UserError(
            f"--input={path}: the patches of this store are {found}x{found}, but the network reads "
            f"{side}x{side}; name another --input"
        )
    if mpp and own and not same_scale(mpp, own):
        raise UserError(
            f"--input={path}: the patches of this store have {own:.4g} um per pixel, but the "
            f"network's have {mpp:.4g}; name another --input"
        )


def _check_pictures(files: Sequence[Path], side: int, mpp: float | None, lenient: bool) -> None:
    errors, without_scale = [], []
    for file in files:
        try:
            header = pictures.look(file, pictures.fit_for(side, mpp))
        except UserError as error:
            errors.append(error)
            continue
        if not header.mpp and max(header.height, header.width) > side:
            without_scale.append(file)
    if errors and not (lenient and len(errors) < len(files)):
        raise errors[0]
    if without_scale and mpp:
        LOG.info(
            "pictures that do not say their um per pixel: %d, the first is %s; they are scored as "
            "if they had the network's %.4g. With --config.slides.mpp=..., TIFF files are read as "
            "slides of that scale",
            len(without_scale),
            without_scale[0],
            mpp,
        )


def read(
    path: Path,
    split: str | None,
    tiling: Tiling,
    mpp: float | None = None,
    unreadable: dict[str, str] | None = None,
    only: Sequence[Path] | None = None,
) -> Iterator[Patch]:
    """Yields the patches of an input in an order that does not depend on the file system.

    Args:
        path: a picture, a folder of pictures, a .npz with `images`, a .h5, .hdf5 or .h5.gz with
            `x`, or a store.
        split: of a store; without it, all splits.
        tiling: how larger pictures are cut. All patches have its side.
        mpp: see `check`.
        unreadable: is filled with the names of pictures that cannot be read, each with the reason;
            the other pictures are read. Without it, the first such picture is an error.
        only: the pictures of the input, or those of them that are read; None: all.

    Raises:
        UserError: a part of it is damaged, or is not a patch.
    """
    if _is_store(path):
        # A generator opens each split only when its turn comes.
        opened = (store.open_split(path, name) for name in _splits(path, split))
        yield from itertools.chain.from_iterable(map(_of_split, opened))
    elif _is_array_file(path):
        for ids, images in _arrays(path, tiling.side):
            yield from map(Patch, ids.tolist(), images)
    else:
        # Ids are relative to the input and use slashes, so that they do not change with its place.
        root = path if path.is_dir() else path.parent
        for file in pictures.find(path) if only is None else only:
            name = file.relative_to(root).as_posix()
            try:
                yield from _of_picture(file, name, tiling, mpp)
            except UserError as error:
                if unreadable is None:
                    raise
                unreadable[name] = str(error).removeprefix(printable(f"{file}: "))


def _arrays(path: Path, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, images) of a file of arrays, at most 512 at a time."""
    return npz.stream(path, side) if path.suffix == ".npz" else hdf5.stream(path, side)


def _of_split(split: store.Split) -> Iterator[Patch]:
    for rows, block in blocks(split.images):
        yield from map(Patch, split.ids[rows].tolist(), block)


def _of_picture(file: Path, name: str, tiling: Tiling, mpp: float | None) -> Iterator[Patch]:
    pixels = pictures.read(file, pictures.fit_for(tiling.side, mpp))
    if pixels.shape[:2] == (tiling.side, tiling.side):
        yield Patch(name, pixels)
        return
    for y, x, tile in pictures.tiles(pixels, tiling):
        # Keep only the path: a heat map reads the picture again, so no pixels stay in memory.
        yield Patch(f"{name}:x={x}:y={y}", tile, file, y, x)


def _is_store(path: Path) -> bool:
    return (path / store.MANIFEST).is_file()


def _is_array_file(path: Path) -> bool:
    # Use the whole name, because the suffix of .h5.gz is only .gz.
    return path.is_file() and path.name.endswith((".npz", ".h5", ".hdf5", ".h5.gz"))


def _splits(path: Path, split: str | None) -> list[str]:
    counts = store.read_manifest(path)["counts"]
    return [split] if split else [name for name in SPLITS if counts.get(name)]
