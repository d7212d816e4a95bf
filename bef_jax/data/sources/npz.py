"""Decoded arrays: {train,valid,test}.npz with images, labels and, optionally, ids."""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.chunk import (
    DEFLATE_RATIO,
    Begin,
    Chunk,
    Contents,
    check_id_array,
    check_ids,
    check_images,
    check_label_array,
    check_labels,
    counted,
    describe_array,
    kept,
    numbered,
    ranges,
    readable,
    silent,
)
from bef_jax.data.patch import READ_ORDER
from bef_jax.data.sources import npy
from bef_jax.data.sources.description import ONLY_SAME_FILES, Description, folder_identity
from bef_jax.errors import UserError
from bef_jax.runtime.files import check_regular, open_user_file, user_path

_PIECE = 1 << 20  # bytes that are read at once
# The most bytes that one byte of a member can unpack to. The decoders of other kinds have no limit.
# They would make gigabytes of a megabyte before the first patch is asked for.
_DENSEST = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_RATIO}
_FIX = "write the file again"

DESCRIPTION = Description(
    shared_slides="not known: it depends on the files; "
    "if yes, a score is higher than on new slides",
    comparable=ONLY_SAME_FILES,
)
identity = folder_identity


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source; its files are looked for when the first chunk is asked for, by `read`."""
    return Contents(read(data, begin), mpp=DESCRIPTION.mpp)


def read(data: ConfigDict, begin: Begin = silent) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of the .npz files in `data.dir`; test.npz may be absent.

    If a file has no ids, they are npz_<split>_<row>.

    Raises:
        UserError: a file is missing, damaged, or its arrays are not patches and labels.
    """
    folder = user_path(data.dir)
    # Look for all files before reading any, so that a missing one is found at once and not after
    # minutes.
    paths = {split: folder / f"{split}.npz" for split in READ_ORDER}
    for path in paths.values():
        check_regular(path)
    if not paths["test"].is_file():
        del paths["test"]
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file; set config.data.dir to the folder that has it")
    for split, path in paths.items():
        yield from _read_split(split, path, data[f"{split}_size"], begin)


def stream(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, images) of one .npz file, which needs no labels, at most 512 at a time.

    If the file has no ids, they are <its name>_<row>.

    Raises:
        UserError: it is damaged, or its arrays are not patches and ids.
    """
    with _opened(path) as archive, _Array(archive, "images", path) as images:
        count = images.check_patches()
        ids = _read_ids(archive, path, count)
        for rows in ranges(count):
            names = _ids_of(ids, path.stem, rows)
            yield names, images.take(len(names))


def _read_split(
    split: str, path: Path, limit: int | None, begin: Begin
) -> Iterator[tuple[str, Chunk]]:
    with _opened(path) as archive, _Array(archive, "images", path) as images:
        count = images.check_patches()
        labels = _read_labels(archive, path, count)
        ids = _read_ids(archive, path, count)
        chunks = (
            Chunk(images.take(len(labels[rows])), labels[rows], _ids_of(ids, f"npz_{split}", rows))
            for rows in ranges(kept(count, limit))
        )
        yield from counted(split, chunks, kept(count, limit), begin)


def _read_labels(archive: zipfile.ZipFile, path: Path, count: int) -> np.ndarray:
    with _Array(archive, "labels", path) as labels:
        check_label_array(labels.header.shape, labels.header.dtype, count, labels.where)
        labels.check_held()
        return check_labels(labels.take(count), count, labels.where)


def _read_ids(archive: zipfile.ZipFile, path: Path, count: int) -> np.ndarray | None:
    if "ids.npy" not in archive.namelist():
        return None
    with _Array(archive, "ids", path) as array:
        file_bytes = path.stat().st_size
        check_id_array(array.header.shape, array.header.dtype, count, file_bytes, array.where)
        array.check_held()
        ids = array.take(count)
        # astype(str) would refuse bytes beyond ASCII.
        ids = np.char.decode(ids) if ids.dtype.kind == "S" else ids.astype(str, copy=False)
        check_ids(ids, array.where)
        return ids


def _ids_of(ids: np.ndarray | None, prefix: str, rows: slice) -> np.ndarray:
    # Make ids chunk by chunk, because a file can declare more rows than memory can hold ids for.
    return numbered(prefix, rows) if ids is None else ids[rows]


# ---- archives and their arrays ------------------------------------------------------------------


class _ShortReads:
    """A file that refuses long reads, because zipfile reads the list of all members at once.

    zipfile makes seven bytes in memory of each byte of that list.
    """

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size if 0 <= size <= _PIECE else _PIECE + 1)
        if len(block) > _PIECE:
            raise ValueError("its list of members is too long")
        return block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with (
        readable(path, _FIX),
        open_user_file(path) as file,
        zipfile.ZipFile(_ShortReads(file)) as archive,
    ):
        yield archive


class _Array(contextlib.AbstractContextManager):
    """An array of an archive, with its header read; its rows are taken in order.

    np.load cannot be used here: it would read the whole array at once, and would prefer a member
    whose name has no .npy.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str, path: Path):
        self.where = f"{path} ({name})"
        self._info = archive.getinfo(f"{name}.npy")
        if self._info.compress_type not in _DENSEST:
            raise UserError(f"{self.where}: packed in a way that np.savez does not use; {_FIX}")
        # The list of members may declare more bytes than the file has.
        self._packed = min(self._info.compress_size, path.stat().st_size)
        self._member = archive.open(self._info)
        self.header = npy.read_header(self._member)

    def __exit__(self, *_: object) -> None:
        self._member.close()

    def check_patches(self) -> int:
        """Checks that the array holds patches, and returns how many."""
        check_images(self.header.shape, self.header.dtype, self.where)
        # In Fortran order each patch is spread over the file, so no part can be read alone.
        if self.header.fortran_order:
            raise UserError(f"{self.where}: in Fortran order; write np.ascontiguousarray(images)")
        self.check_held()
        return self.header.shape[0]

    def check_held(self) -> None:
        """Checks that the header's array is as large as its member, and that the file can hold it.

        Call it before the first row is taken, because `take` reserves the memory that the header
        declares.
        """
        size = self.header.nbytes + self._member.tell()
        if size != self._info.file_size or size > self._packed * _DENSEST[self._info.compress_type]:
            declared = describe_array(self.header.shape, self.header.dtype)
            raise UserError(f"{self.where}: declares {declared}, which it does not hold; {_FIX}")

    def take(self, count: int) -> np.ndarray:
        """Returns the next `count` rows."""
        shape = (count, *self.header.shape[1:])
        flat = np.empty(math.prod(shape) * self.header.dtype.itemsize, np.uint8)
        for start in range(0, len(flat), _PIECE):
            wanted = flat[start : start + _PIECE]
            block = self._member.read(len(wanted))
            if len(block) != len(wanted):
                raise EOFError("it ends too early")
            wanted[:] = np.frombuffer(block, np.uint8)
        return flat.view(self.header.dtype).reshape(shape)
