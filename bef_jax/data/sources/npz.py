"""Decoded arrays: {train,valid,test}.npz with images and labels; ids and groups may be there."""

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
    check_texts,
    counted,
    describe_array,
    kept,
    numbered,
    ranges,
    readable,
    silent,
)
from bef_jax.data.patch import PCAM_SIDE, READ_ORDER
from bef_jax.data.sources import npy
from bef_jax.data.sources.description import (
    ONLY_SAME_FILES,
    Description,
    folder_identity,
    numbered_classes,
)
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


def identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide which patches the files hold."""
    classes = {"patch_size": data.patch_size, "classes": list(data.classes)}
    return folder_identity(data) | classes


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source; its files are looked for when the first chunk is asked for, by `read`."""
    return Contents(read(data, begin), numbered_classes(data), DESCRIPTION.mpp)


def read(data: ConfigDict, begin: Begin = silent) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of the .npz files in `data.dir`; test.npz may be absent.

    If a file has no ids, they are npz_<split>_<row>. Labels are numbers, in the order of
    `data.classes`.

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
        yield from _read_split(split, path, data, begin)


def stream(path: Path, side: int = PCAM_SIDE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, images) of one .npz file, which needs no labels, at most 512 at a time.

    If the file has no ids, they are <its name>_<row>.

    Args:
        side: of a patch, in pixels.

    Raises:
        UserError: it is damaged, or its arrays are not patches and ids.
    """
    with _opened(path) as archive, _Array(archive, "images", path) as images:
        count = images.check_patches(side)
        ids = _read_texts(archive, "ids", path, count)
        for rows in ranges(count):
            names = _ids_of(ids, path.stem, rows)
            yield names, images.take(len(names))


def _read_split(
    split: str, path: Path, data: ConfigDict, begin: Begin
) -> Iterator[tuple[str, Chunk]]:
    with _opened(path) as archive, _Array(archive, "images", path) as images:
        count = images.check_patches(data.patch_size)
        labels = _read_labels(archive, path, count, numbered_classes(data))
        ids = _read_texts(archive, "ids", path, count)
        groups = _read_texts(archive, "groups", path, count)
        total = kept(count, data[f"{split}_size"])
        chunks = (
            Chunk(
                images.take(len(labels[rows])),
                labels[rows],
                _ids_of(ids, f"npz_{split}", rows),
                None if groups is None else groups[rows],
            )
            for rows in ranges(total)
        )
        yield from counted(split, chunks, total, begin)


def _read_labels(
    archive: zipfile.ZipFile, path: Path, count: int, classes: tuple[str, ...]
) -> np.ndarray:
    with _Array(archive, "labels", path) as labels:
        check_label_array(labels.header.shape, labels.header.dtype, count, labels.where)
        labels.check_held()
        return check_labels(labels.take(count), count, labels.where, classes)


def _read_texts(archive: zipfile.ZipFile, name: str, path: Path, count: int) -> np.ndarray | None:
    """Returns `ids`, each of which comes once, or `groups`; str [count], or None without them."""
    if f"{name}.npy" not in archive.namelist():
        return None
    with _Array(archive, name, path) as array:
        file_bytes = path.stat().st_size
        check_id_array(array.header.shape, array.header.dtype, count, file_bytes, array.where)
        array.check_held()
        texts = array.take(count)
        # astype(str) would refuse bytes beyond ASCII.
        is_bytes = texts.dtype.kind == "S"
        texts = np.char.decode(texts) if is_bytes else texts.astype(str, copy=False)
        (check_ids if name == "ids" else check_texts)(texts, array.where)
        return texts


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

    def check_patches(self, side: int) -> int:
        """Checks that the array holds patches of this side, and returns how many."""
        check_images(self.header.shape, self.header.dtype, self.where, side)
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
