"""PatchCamelyon's own files: camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 or .h5.gz."""

import contextlib
import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from ml_collections import ConfigDict

from bef_jax.data import fetch
from bef_jax.data.chunk import (
    READ_ORDER,
    Chunk,
    check_images,
    check_labels,
    kept,
    ranges,
)
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path

# What h5py makes of HDF5's errors, by where in the file the damage is.
_HDF5_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, MemoryError, OverflowError)
# The largest file of PCam unpacks to 7.25 GB; what goes on for longer is no PCam, and would fill
# the disk.
_UNPACKED_LIMIT = 10**10
_DENSEST = 2000  # pixels a byte; gzip comes to 1032 where all are equal
CACHE_BYTES = 64 << 20  # of HDF5's chunks: a chunk is then decompressed once, whatever its shape


def read(data: ConfigDict) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of PCam's HDF5 files in `data.dir`; the test split may be absent.

    The id of a patch is pcam_<split>_<row of the file>. With `data.download`, files that are
    missing are fetched first.

    Raises:
        UserError: a file is missing, damaged, or holds something else than PCam's patches.
    """
    folder = user_path(data.dir)
    if data.download:
        fetch.fetch_pcam(folder)
    # All of them first: a file that is missing is named before gigabytes are unpacked.
    paths = {split: _split_paths(folder, split) for split in READ_ORDER}
    for split, found in paths.items():
        if found is not None:
            for chunk in _read_split(split, *found, data[f"{split}_size"]):
                yield split, chunk


def stream(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, images) of the data set `x` of one .h5 or .h5.gz, at most 512 at a time.

    The id of a patch is <the file's name>_<row>.

    Raises:
        UserError: it is damaged, or holds something else than patches.
    """
    stem = path.name.removesuffix(".gz").removesuffix(".h5")
    with _dataset(path, "x") as x:
        _check_patches(x, path)
        for rows in ranges(len(x)):
            yield np.asarray([f"{stem}_{row}" for row in range(rows.start, rows.stop)]), x[rows]


def _check_patches(x: h5py.Dataset, path: Path) -> None:
    check_images(x.shape, x.dtype, str(path))
    # Before they are read: a file of a few bytes can declare 10^12 labels, or patches.
    if x.nbytes > _DENSEST * x.id.get_storage_size():
        raise UserError(f"{path}: declares {len(x)} patches that it does not hold; fetch it")


def _split_paths(folder: Path, split: str) -> tuple[Path, Path] | None:
    stem = f"camelyonpatch_level_2_split_{split}"
    found = {name: _find(folder / f"{stem}_{name}.h5") for name in "xy"}
    if split == "test" and not any(found.values()):
        return None
    for name, path in found.items():
        if path is None:
            raise UserError(
                f"{folder / stem}_{name}.h5 (or .h5.gz): no such file; set config.data.dir, "
                "or fetch PCam with --config.data.download=True"
            )
    return found["x"], found["y"]


def _find(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    # The unpacked one first: unpacking costs minutes, and room for a copy.
    return next((candidate for candidate in (path, packed) if candidate.is_file()), None)


def _read_split(split: str, images: Path, labels: Path, limit: int | None) -> Iterator[Chunk]:
    # Labels first: a file of them that can't be read shows before the images are unpacked.
    with _dataset(labels, "y") as y, _dataset(images, "x") as x:
        _check_patches(x, images)
        if y.size != len(x):
            raise UserError(f"{labels}: {y.size} labels for {len(x)} images; fetch both again")
        flags = check_labels(y[:], len(x), str(labels))
        for rows in ranges(kept(len(x), limit)):
            # By row, as TFDS's ids are: a patch has one id, whichever of them it comes from.
            ids = [f"pcam_{split}_{row}" for row in range(rows.start, rows.stop)]
            yield Chunk(x[rows], flags[rows], np.asarray(ids))


@contextlib.contextmanager
def _dataset(path: Path, name: str) -> Iterator[h5py.Dataset]:
    """Opens the data set `name` of an HDF5 file; what HDF5 or gzip dislike is a UserError."""
    try:
        with _unpacked(path) as source, h5py.File(source, "r", rdcc_nbytes=CACHE_BYTES) as file:
            if not isinstance(file.get(name), h5py.Dataset):
                raise UserError(f"{path}: has no data set '{name}'; is it one of PCam's files?")
            yield file[name]
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, *_HDF5_ERRORS) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); fetch it again, or unpack it yourself"
        ) from error


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator:
    """Gives what h5py opens: the path itself, or an unpacked copy of a .gz file."""
    if path.suffix != ".gz":
        yield path
        return
    # HDF5 seeks, gzip cannot. The copy has no name, so that even a kill leaves nothing behind.
    # Beside the file, where there is room for data: /tmp is often small, or memory.
    folder = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.TemporaryFile(dir=folder) as copy:
        with gzip.open(path) as packed:
            while block := packed.read(1 << 20):
                copy.write(block)
                if copy.tell() > _UNPACKED_LIMIT:
                    raise UserError(f"{path}: unpacks to more than PCam's files do; fetch it again")
        yield copy
