"""Decoded arrays: {train,valid,test}.npz with images, labels and, optionally, ids."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.chunk import (
    IMAGE_SHAPE,
    READ_ORDER,
    Chunk,
    check_images,
    check_labels,
    kept,
    ranges,
)
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path

_LONGEST = 4096  # bytes of a label or an id: a thousand characters
_HEADERS = {  # of .npy, by the version of the format
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read(data: ConfigDict) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of the .npz files in `data.dir`; test.npz may be absent.

    A file without ids gets npz_<split>_<row>.

    Raises:
        UserError: a file is missing, damaged, or its arrays are not patches and labels.
    """
    folder = user_path(data.dir)
    # All are looked for before any is read: a missing one should not turn up after the first's
    # minutes.
    paths = {split: folder / f"{split}.npz" for split in READ_ORDER}
    if not paths["test"].is_file():
        del paths["test"]
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file; set config.data.dir to the folder that has it")
    for split, path in paths.items():
        with _readable(path):
            for chunk in _read_split(split, path, data[f"{split}_size"]):
                yield split, chunk


def stream(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, images) of one .npz file, which needs no labels, at most 512 at a time.

    A file without ids gets <its name>_<row>.

    Raises:
        UserError: it is damaged, or its arrays are not patches and ids.
    """
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open("images.npy") as member:
        count = _read_header(member, path)[0]
        ids = _read_ids(path, path.stem, count)
        for rows in ranges(count):
            yield ids[rows], _read_images(member, rows.stop - rows.start)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what zipfile and NumPy say about a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy's parser of headers raise many kinds
        raise UserError(f"{path}: cannot be read ({error}); write the file again") from error


def _read_split(split: str, path: Path, limit: int | None) -> Iterator[Chunk]:
    # Two readers of one file: a stream for the images, np.load for what is small.
    with zipfile.ZipFile(path) as archive, archive.open("images.npy") as member:
        shape = _read_header(member, path)
        labels, ids = _read_labels(path, split, shape[0])
        for rows in ranges(kept(shape[0], limit)):
            yield Chunk(_read_images(member, rows.stop - rows.start), labels[rows], ids[rows])


def _read_header(member: zipfile.ZipExtFile, path: Path) -> tuple[int, ...]:
    # 3.0 is for the names of structured dtypes, which are no patches: its KeyError is told as a
    # file that can't be read.
    version = np.lib.format.read_magic(member)
    shape, fortran_order, dtype = _HEADERS[version](member)
    check_images(shape, dtype, f"{path} (images)")
    # Its first axis is not consecutive in the file, so that no part can be read alone.
    if fortran_order:
        raise UserError(f"{path} (images): Fortran order; write np.ascontiguousarray(images)")
    return shape


def _check_count(archive: zipfile.ZipFile, name: str, count: int, path: Path) -> None:
    """Before the array is read: a file of a few bytes can declare 10^12 labels."""
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        shape, _, dtype = _HEADERS[version](member)
    if int(np.prod(shape, dtype=object)) != count or dtype.itemsize > _LONGEST:
        raise UserError(
            f"{path} ({name[:-4]}): {dtype} {list(shape)} for {count} images; "
            "write one short value for each"
        )


def _read_images(member: zipfile.ZipExtFile, count: int) -> np.ndarray:
    # np.load would hold the whole array in memory: only these rows are taken off the stream.
    size = count * int(np.prod(IMAGE_SHAPE))
    block = member.read(size)
    if len(block) != size:
        raise EOFError("images end too early")
    return np.frombuffer(block, np.uint8).reshape(count, *IMAGE_SHAPE)


def _read_labels(path: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        if "labels.npy" in archive.namelist():
            _check_count(archive, "labels.npy", count, path)
    # A pickle in a data set could run code.
    with np.load(path, allow_pickle=False) as arrays:
        labels = check_labels(arrays["labels"], count, f"{path} (labels)")
    return labels, _read_ids(path, f"npz_{split}", count)


def _read_ids(path: Path, prefix: str, count: int) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        if "ids.npy" not in archive.namelist():
            return np.asarray([f"{prefix}_{row}" for row in range(count)])
        _check_count(archive, "ids.npy", count, path)
    with np.load(path, allow_pickle=False) as arrays:
        ids = arrays["ids"]
    # astype(str) would refuse bytes beyond ASCII.
    ids = np.char.decode(ids) if ids.dtype.kind == "S" else ids.astype(str)
    if ids.shape != (count,):
        raise UserError(f"{path} (ids): shape {list(ids.shape)} for {count} images; one id each")
    _check_unique(ids, path)
    return ids


def _check_unique(ids: np.ndarray, path: Path) -> None:
    names, counts = np.unique(ids, return_counts=True)
    if len(names) < len(ids):
        raise UserError(
            f"{path} (ids): {names[counts.argmax()]!s} names {counts.max()} patches; "
            "give each its own id, or leave `ids` out"
        )
