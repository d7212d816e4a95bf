"""PatchCamelyon's own files: camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 or .h5.gz."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.chunk import (
    Begin,
    Chunk,
    check_images,
    check_label_array,
    check_labels,
    counted,
    kept,
    numbered,
    silent,
)
from bef_jax.data.patch import READ_ORDER
from bef_jax.data.sources import fetch, hdf5
from bef_jax.errors import UserError
from bef_jax.runtime.files import check_regular, user_path


def read(data: ConfigDict, begin: Begin = silent) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of PCam's HDF5 files in `data.dir`; the test split may be absent.

    The id of a patch is pcam_<split>_<row of the file>. With `data.download`, missing files are
    fetched first.

    Raises:
        UserError: a file is missing, damaged, or holds something other than PCam's patches.
    """
    folder = user_path(data.dir)
    if data.download:
        fetch.fetch_pcam(folder, begin=begin)
    # Look for all files first, so that a missing one is named before gigabytes are unpacked.
    paths = {split: _split_paths(folder, split) for split in READ_ORDER}
    for split, found in paths.items():
        if found is not None:
            yield from _read_split(split, *found, data[f"{split}_size"], begin)


def stream(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, images) of the data set `x` of one .h5 or .h5.gz, at most 512 at a time.

    The id of a patch is <the file's name>_<row>.

    Raises:
        UserError: it is damaged, or holds something other than patches.
    """
    stem = path.name.removesuffix(".gz").removesuffix(".h5")
    with hdf5.dataset(path, "x") as x:
        for rows, images in hdf5.blocks(x, _check_patches(x, path)):
            yield numbered(stem, rows), images


def _check_patches(x: h5py.Dataset, path: Path) -> int:
    """Checks that `x` holds patches, and returns how many."""
    check_images(x.shape or (), x.dtype, str(path))
    hdf5.check_held(x, path)
    return len(x)


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
    # Prefer the unpacked file, because unpacking costs minutes and room for a copy.
    candidates = (path, path.with_name(path.name + ".gz"))
    for candidate in candidates:
        check_regular(candidate)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_split(
    split: str, images: Path, labels: Path, limit: int | None, begin: Begin
) -> Iterator[tuple[str, Chunk]]:
    # Open the labels first, so that a damaged file of them is found before the images are unpacked.
    with hdf5.dataset(labels, "y") as y, hdf5.dataset(images, "x", begin) as x:
        flags = _read_labels(y, _check_patches(x, images), labels)
        count = kept(len(x), limit)
        # Number ids by row, as TFDS does, so that a patch has the same id in both sources.
        chunks = (
            Chunk(block, flags[rows], numbered(f"pcam_{split}", rows))
            for rows, block in hdf5.blocks(x, count)
        )
        yield from counted(split, chunks, count, begin)


def _read_labels(y: h5py.Dataset, count: int, path: Path) -> np.ndarray:
    check_label_array(y.shape or (), y.dtype, count, str(path))
    hdf5.check_held(y, path)
    return check_labels(y[:], count, str(path))
