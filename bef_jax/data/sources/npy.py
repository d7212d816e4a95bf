"""Reads the header of a .npy from somebody else, which can declare anything."""

import io
import math
from typing import IO, NamedTuple

import numpy as np

_LONGEST = 10_000  # bytes of a header; NumPy has the same limit
_PARSERS = {  # by the version of the format
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Header(NamedTuple):
    """The shape, order and dtype that a .npy declares for its array."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Returns how many bytes the declared array needs."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> Header:
    """Reads the header, and leaves `stream` at the first byte of the array.

    Raises:
        Exception: it is not a .npy, or its header is damaged; NumPy's parser raises many kinds.
    """
    version = np.lib.format.read_magic(stream)
    # Version 3.0 is for the names of structured dtypes, which neither patches nor labels have.
    if version not in _PARSERS:
        raise ValueError(f"version {version} of .npy is not supported")
    prefix = stream.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(prefix, "little")
    # NumPy checks the length only after it has read that much, up to 4 GiB.
    if length > _LONGEST:
        raise ValueError(f"a header of {length} bytes is too long")
    text = io.BytesIO(prefix + stream.read(length))
    return Header(*_PARSERS[version](text))
