"""Reads the headers of a Parquet file's pages, which say how much each page unpacks to.

Arrow believes them: a page of a kilobyte can fill gigabytes. The format is Thrift's compact
protocol; see PageHeader of https://github.com/apache/parquet-format/ (parquet.thrift).
"""

from typing import BinaryIO

_UNPACKED, _PACKED = 2, 3  # fields of PageHeader
# Types of Thrift. Others are in no header of a page.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _BINARY, _STRUCT = 1, 2, 3, 4, 5, 6, 8, 12


def largest_page(file: BinaryIO, start: int, size: int) -> int:
    """Returns the bytes of the largest page of a column chunk, unpacked.

    Args:
        file: the Parquet file.
        start: where the chunk begins.
        size: of the chunk, with the headers of its pages, in bytes.

    Raises:
        ValueError: a header is damaged, or the chunk ends too early.
    """
    largest, position = 0, start
    while position < start + size:
        file.seek(position)
        header = _struct(file)
        unpacked, packed = header.get(_UNPACKED, -1), header.get(_PACKED, -1)
        if min(unpacked, packed) < 0:
            raise ValueError("the header of a page is damaged")
        largest = max(largest, unpacked)
        position = file.tell() + packed
    return largest


def _struct(file: BinaryIO) -> dict[int, int]:
    """Returns the whole numbers of a struct, by the numbers of their fields; skips the others."""
    numbers, field = {}, 0
    while (head := _byte(file)) != 0:
        kind = head & 15
        field = field + (head >> 4) if head >> 4 else _zigzag(file)
        if kind in (_I16, _I32, _I64):
            numbers[field] = _zigzag(file)
        elif kind == _BINARY:
            file.seek(_varint(file), 1)
        elif kind == _STRUCT:
            _struct(file)
        elif kind == _BYTE:
            _byte(file)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError("the header of a page is damaged")
    return numbers


def _zigzag(file: BinaryIO) -> int:
    number = _varint(file)
    return (number >> 1) ^ -(number & 1)


def _varint(file: BinaryIO) -> int:
    number = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("the header of a page is damaged")


def _byte(file: BinaryIO) -> int:
    found = file.read(1)
    if not found:
        raise ValueError("it ends too early")
    return found[0]
