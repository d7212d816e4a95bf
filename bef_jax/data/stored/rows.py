"""The rows of an array on disk, which are read when they are indexed.

A memory map would read ahead around each row: 64 times as many bytes as a batch of random patches
has. It would also end the process with SIGBUS where the file can't be read.
"""

import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bef_jax.data.chunk import ranges
from bef_jax.errors import RunError, reason_of


class StoredRows:
    """A uint8 array in a file, in C order; indexing its first axis reads rows into a new array.

    An index is what NumPy takes for one axis. Several threads may read at once.

    Attributes:
        shape: [N, ...].
        dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, file: Path, offset: int, shape: tuple[int, ...]):
        """Opens the file, which stays open as long as this object.

        Args:
            file: a regular file.
            offset: of the first row, in bytes.
            shape: [N, ...], N > 0.

        Raises:
            OSError: the file cannot be opened.
        """
        self.shape = shape
        self._file, self._offset = file, offset
        self._row_bytes = prod(shape[1:])
        self._numbers = np.arange(len(self))  # NumPy finds the rows of any index in it
        self._descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        if hasattr(os, "posix_fadvise"):  # macOS has none, and its reads are right without
            # The kernel then reads what is asked for, and nothing around it.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""
        return prod(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the rows of `index`, uint8, as NumPy's indexing of an array would.

        Raises:
            IndexError: there is no such row.
            RunError: the file cannot be read, or was cut after it was opened.
        """
        rows = self._numbers[index]
        found = np.empty((*rows.shape, *self.shape[1:]), np.uint8)
        flat, runs = memoryview(found.reshape(-1)), _runs(rows.reshape(-1))
        try:
            self._announce(runs)
            done = 0
            for first, count in runs:
                self._read(first * self._row_bytes, flat[done : done + count * self._row_bytes])
                done += count * self._row_bytes
        except OSError as error:
            raise RunError(f"{self._file}: cannot be read ({reason_of(error)})") from error
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all rows, for NumPy's functions; only small arrays should come here."""
        del copy
        return self[:].astype(dtype or self.dtype, copy=False)

    def _announce(self, runs: list[tuple[int, int]]) -> None:
        """Tells the kernel of all reads, because a disk answers many at once faster than in turn.

        It takes 1 us for a row that is in memory. Threads that read would cost more.
        """
        if len(runs) > 1 and hasattr(os, "posix_fadvise"):
            for first, count in runs:
                start, size = self._offset + first * self._row_bytes, count * self._row_bytes
                os.posix_fadvise(self._descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def _read(self, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes from `start` on; one call reads at most 2 GiB."""
        while len(into):
            count = os.preadv(self._descriptor, [into], self._offset + start)
            if not count:
                raise RunError(f"{self._file}: has become shorter since it was opened")
            start, into = start + count, into[count:]


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Returns (first row, count) of each run of consecutive numbers in [n]."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    counts = np.diff(starts, append=len(rows))
    return list(zip(rows[starts].tolist(), counts.tolist(), strict=True))


def blocks(images: np.ndarray | StoredRows) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (slice, images[slice]) in order, at most 512 rows at a time, 13.5 MiB at 96 px.

    The next block is read while the caller uses one, so memory holds two.

    Raises:
        RunError: see `StoredRows`.
    """
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for rows, following in pairwise([None, *ranges(len(images)), None]):
            block = ahead and ahead.result()
            ahead = following and pool.submit(images.__getitem__, following)
            if rows is not None:
                yield rows, block
