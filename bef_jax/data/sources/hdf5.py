"""Reads patches and labels from PCam's HDF5 files, and from others of the same layout.

No file is trusted. Its data must be in the file itself: files that it names are never opened.
"""

import contextlib
import gzip
import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import h5py
import imagecodecs
import numpy as np
from h5py import h5d, h5z

from bef_jax.data.chunk import (
    CHUNK_SIZE,
    DEFLATE_RATIO,
    Begin,
    Chunk,
    check_images,
    check_label_array,
    check_labels,
    counted,
    kept,
    numbered,
    ranges,
    readable,
    short_name,
    silent,
)
from bef_jax.data.patch import PCAM_SIDE
from bef_jax.errors import UserError
from bef_jax.runtime.files import check_regular, open_user_file

_FIX = "fetch it again, or unpack a .gz yourself"
# The largest file of PCam unpacks to 7.25 GB. A longer one is not PCam's and would fill the disk.
_UNPACKED_LIMIT = 10**10  # bytes
_UNPACKED_ALWAYS_ALLOWED = 64 << 20  # bytes
# PCam's images shrink to nine tenths, and its labels to a tenth.
_MAX_RATIO = 100  # of unpacked bytes to packed ones
_CHUNK_LIMIT = 64 << 20  # bytes of one of HDF5's chunks, unpacked
_BAND_LIMIT = 512 << 20  # bytes of the rows that share a chunk and are read together
# The most bytes that one byte of a chunk can unpack to. HDF5 unpacks all of them, even beyond the
# size that the chunk declares.
_DENSEST = {h5z.FILTER_DEFLATE: DEFLATE_RATIO, h5z.FILTER_LZF: 100}
_SIZE_KEEPING = (h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32)
_UNCHECKED_CHUNK_BYTES = 256 << 20  # a chunk that cannot unpack to more is not checked


def stream(path: Path, side: int = PCAM_SIDE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, images) of the data set `x` of one .h5 or .h5.gz, at most 512 at a time.

    The id of a patch is <the file's name>_<row>.

    Args:
        side: of a patch, in pixels.

    Raises:
        UserError: it is damaged, or holds something other than patches.
    """
    stem = path.name.removesuffix(".gz").removesuffix(".h5")
    with _dataset(path, "x") as x:
        for rows, images in _blocks(x, _check_patches(x, path, side)):
            yield numbered(stem, rows), images


def read_split(
    split: str, images: Path, labels: Path, limit: int | None, begin: Begin
) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of the data sets `x` of `images` and `y` of `labels`.

    The id of a patch is pcam_<split>_<row of the file>.

    Args:
        limit: most patches to read, or None for all.

    Raises:
        UserError: a file is damaged, or holds something other than PCam's patches and labels.
    """
    # Open the labels first, so that a damaged file of them is found before the images are unpacked.
    with _dataset(labels, "y") as y, _dataset(images, "x", begin) as x:
        flags = _read_labels(y, _check_patches(x, images), labels)
        count = kept(len(x), limit)
        # Number ids by row, as TFDS does, so that a patch has the same id in both sources.
        chunks = (
            Chunk(block, flags[rows], numbered(f"pcam_{split}", rows))
            for rows, block in _blocks(x, count)
        )
        yield from counted(split, chunks, count, begin)


def _read_labels(y: h5py.Dataset, count: int, path: Path) -> np.ndarray:
    check_label_array(y.shape or (), y.dtype, count, str(path))
    _check_storage(y, path)
    return check_labels(y[:], count, str(path))


def _check_patches(x: h5py.Dataset, path: Path, side: int = PCAM_SIDE) -> int:
    """Checks that `x` holds patches, and returns how many."""
    check_images(x.shape or (), x.dtype, str(path), side)
    _check_storage(x, path, is_bounded=_has_deflated_rows(x))
    return len(x)


# ---- one data set -------------------------------------------------------------------------------


@contextlib.contextmanager
def _dataset(path: Path, name: str, begin: Begin = silent) -> Iterator[h5py.Dataset]:
    """Opens the data set `name` of a .h5 or .h5.gz.

    Its data are in the file itself. The caller must check its shape and dtype, and then call
    `_check_storage`, before reading it.

    Raises:
        UserError: the file is damaged, is not a regular file, or has no such data set.
    """
    with readable(path, _FIX), _unpacked(path, begin) as source, h5py.File(source, "r") as file:
        # Check its link first, because looking at the data set opens any file that a link names.
        is_own = isinstance(file.get(name, getlink=True), h5py.HardLink)
        if not is_own or not isinstance(file[name], h5py.Dataset):
            raise UserError(
                f"{path}: has no data set '{name}'; name images x and labels y, as in PCam's files"
            )
        _check_not_external(file[name], path)
        yield file[name]


def _check_storage(data: h5py.Dataset, path: Path, is_bounded: bool = False) -> None:
    """Checks that a data set holds what it declares, and can be read in little memory.

    Call it after the data set's shape and dtype are checked, and before the data set is read.

    Args:
        is_bounded: the reader itself stops where a chunk unpacks to more than it declares.

    Raises:
        UserError: it holds less, or its chunks are too large or packed by a filter that is not
            read.
    """
    if data.chunks is None:
        held = min(data.id.get_storage_size(), data.file.id.get_filesize())
        if data.nbytes > held:
            raise UserError(f"{path}: declares {data.nbytes} bytes, but holds {held}; {_FIX}")
        return
    chunk = math.prod(data.chunks) * data.dtype.itemsize
    band = data.chunks[0] * math.prod(data.shape[1:]) * data.dtype.itemsize
    if chunk > _CHUNK_LIMIT or band > _BAND_LIMIT:
        raise UserError(
            f"{path}: chunks of {data.chunks} are too large to be read; {_repack(data)}"
        )
    _check_chunks(data, chunk, path, is_bounded)


def _blocks(data: h5py.Dataset, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (slice, rows) for the first `count` rows, at most 512 at a time.

    Each of HDF5's chunks is unpacked once. Call `_check_storage` first.
    """
    step = data.chunks[0] if data.chunks else 1
    read = _inflate if _has_deflated_rows(data) else _read
    # Read whole chunks. To read 512 rows at a time would unpack a chunk of 8,192 rows 16 times.
    band = np.empty((step * max(1, CHUNK_SIZE // step), *data.shape[1:]), data.dtype)
    for start in range(0, count, len(band)):
        stop = min(start + len(band), count)
        read(data, start, band[: stop - start])
        for rows in ranges(stop - start):
            yield slice(start + rows.start, start + rows.stop), band[rows].copy()


def _read(data: h5py.Dataset, start: int, into: np.ndarray) -> None:
    data.read_direct(into, np.s_[start : start + len(into)])


def _has_deflated_rows(data: h5py.Dataset) -> bool:
    """Returns whether the chunks are whole rows of bytes, and packed by gzip alone."""
    plist = data.id.get_create_plist()
    codes = [plist.get_filter(place)[0] for place in range(plist.get_nfilters())]
    return codes == [h5z.FILTER_DEFLATE] and data.chunks[1:] == data.shape[1:]


def _inflate(data: h5py.Dataset, start: int, into: np.ndarray) -> None:
    """Reads uint8 rows as `_read` does, from the start of a chunk on.

    libdeflate unpacks in half the time of the zlib in HDF5, and never more than a chunk declares.
    """
    step = data.chunks[0]
    for first in range(0, len(into), step):
        rows = into[first : first + step]
        place = (start + first, *[0] * (data.ndim - 1))
        filter_mask, packed = data.id.read_direct_chunk(place)
        if filter_mask & 1:  # packing would not have made it smaller
            _read(data, place[0], rows)
            continue
        whole = rows if len(rows) == step else np.empty(data.chunks, np.uint8)
        found = imagecodecs.deflate_decode(packed, out=whole.reshape(-1))
        if len(found) < whole.size:
            raise ValueError(f"the chunk at {place} unpacks to {len(found)} bytes")
        rows[:] = whole[: len(rows)]


# ---- what a data set can be made of -------------------------------------------------------------


def _check_not_external(data: h5py.Dataset, path: Path) -> None:
    # Check before its shape is used, because that opens the files of a virtual data set.
    plist = data.id.get_create_plist()
    if plist.get_layout() == h5d.VIRTUAL or plist.get_external_count():
        raise UserError(
            f"{path}: its data set '{data.name}' lies in other files, which are not opened; "
            "write it as one file"
        )


def _check_chunks(data: h5py.Dataset, unpacked_size: int, path: Path, is_bounded: bool) -> None:
    """Checks that all chunks are there, and that none unpacks to more than it declares."""
    place, code = _packing(data, path) or (None, None)
    large = []

    def collect_large(chunk: h5d.StoreInfo) -> None:
        # HDF5 leaves the filter out for a chunk that packing would not make smaller.
        is_left_out = (chunk.filter_mask >> place) & 1
        if not is_left_out and chunk.size * _DENSEST[code] > _UNCHECKED_CHUNK_BYTES:
            large.append(chunk)

    if code is not None:
        data.id.chunk_iter(collect_large)
    wanted = math.prod(-(-n // m) for n, m in zip(data.shape, data.chunks, strict=True))
    if data.id.get_num_chunks() < wanted:
        raise UserError(f"{path}: declares {len(data)} rows that it does not hold; {_FIX}")
    for chunk in large:
        if not _unpacks_within(data, chunk, unpacked_size, code, is_bounded):
            raise UserError(
                f"{path}: the chunk at {chunk.chunk_offset} may be too large to be read; "
                f"{_repack(data)}"
            )


def _repack(data: h5py.Dataset) -> str:
    row = "x".join(map(str, (1, *data.shape[1:])))
    return f"repack it: h5repack -l CHUNK={row} -f GZIP=1"


def _packing(data: h5py.Dataset, path: Path) -> tuple[int, int] | None:
    """Returns the place and the code of the filter that packs the chunks, or None."""
    plist = data.id.get_create_plist()
    codes = [plist.get_filter(place)[0] for place in range(plist.get_nfilters())]
    packing = [(place, code) for place, code in enumerate(codes) if code not in _SIZE_KEEPING]
    if len(packing) > 1 or any(code not in _DENSEST for _, code in packing):
        raise UserError(
            f"{path}: packed by the filters {codes}; only one of gzip and LZF is read; "
            f"{_repack(data)}"
        )
    return packing[0] if packing else None


def _unpacks_within(
    data: h5py.Dataset, chunk: h5d.StoreInfo, size: int, code: int, is_bounded: bool
) -> bool:
    """Returns whether a packed chunk certainly unpacks to no more than `size` bytes.

    A bounded reader finds this out while it unpacks. To try it here would take as long again.
    """
    # Packing adds less than a hundredth, so a larger chunk unpacks to more. A stream of LZF cannot
    # be checked here.
    if code != h5z.FILTER_DEFLATE or chunk.size > size * 1.01 + 1024:
        return False
    if is_bounded:
        return True
    _, packed = data.id.read_direct_chunk(chunk.chunk_offset)
    # zlib stops after one byte too many; HDF5 would unpack the whole stream.
    return len(zlib.decompressobj().decompress(packed, size + 1)) <= size


# ---- .gz ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _unpacked(path: Path, begin: Begin) -> Iterator:
    """Yields what h5py opens: the path itself, or an unpacked copy of a .gz file."""
    check_regular(path)
    if path.suffix != ".gz":
        yield path
        return
    # HDF5 seeks, but gzip cannot. The copy has no name, so that even a kill leaves nothing behind.
    # It is beside the file, where there is room for data, because /tmp is often small or in memory.
    folder = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.TemporaryFile(dir=folder) as copy:
        _unpack(path, copy, begin)
        yield copy


def _unpack(path: Path, copy: IO[bytes], begin: Begin) -> None:
    size = path.stat().st_size
    limit = min(_UNPACKED_LIMIT, max(_UNPACKED_ALWAYS_ALLOWED, _MAX_RATIO * size))
    advance = begin(f"unpacking {short_name(path.name)}", size, "bytes")
    before = 0
    with open_user_file(path) as raw, gzip.open(raw) as packed:
        while block := packed.read(1 << 20):
            copy.write(block)
            if copy.tell() > limit:
                raise UserError(
                    f"{path}: unpacks to more than {_UNPACKED_LIMIT // 10**9} GB or {_MAX_RATIO} "
                    f"times its size, which no file of PCam does; {_FIX}"
                )
            advance(raw.tell() - before)
            before = raw.tell()
