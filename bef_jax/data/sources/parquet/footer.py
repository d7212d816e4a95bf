"""Reads a Parquet file's footer and the headers of its pages, which say how much memory they take.

Arrow believes them: a page of a kilobyte can fill gigabytes. Arrow can also abort the process when
its own object of a damaged column chunk is made, so the footer is read here. The format is Thrift's
compact protocol; see parquet.thrift of https://github.com/apache/parquet-format/.
"""

import io
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bef_jax.runtime.files import open_user_file

_LIMIT = 8 << 20  # bytes of a footer; the objects made of it take many times as much
_LONGEST = 1 << 20  # bytes of a text or of a statistic
_DAMAGED = "its footer, or the header of a page, is damaged"
# Types of Thrift.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12,
)  # fmt: skip
_BYTE_ARRAYS = (6, 7)  # types of a column whose values are bytes


class Chunk(NamedTuple):
    """A column of a row group.

    Attributes:
        start: where its pages begin in the file.
        size: of its pages, in bytes of the file.
        has_bytes: whether its values are bytes or text, of any length.
    """

    start: int
    size: int
    has_bytes: bool


class RowGroup(NamedTuple):
    """Some rows of the file.

    Attributes:
        count: how many.
        chunks: by the name of the column, such as image.bytes.
    """

    count: int
    chunks: dict[str, Chunk]


def read_footer(path: Path) -> list[RowGroup]:
    """Returns the row groups of a file.

    Raises:
        ValueError: it is damaged, or is no Parquet file.
    """
    with open_user_file(path) as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(max(0, end - 8))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > end - 8:
            raise ValueError("it is no Parquet file, or is cut")
        if length > _LIMIT:
            raise ValueError(f"its footer has {length} bytes, above {_LIMIT}")
        file.seek(end - 8 - length)
        content = _struct(io.BytesIO(file.read(length)))
    try:
        groups = [_row_group(group) for group in content[4]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(_DAMAGED) from error
    if sum(group.count for group in groups) != content[3]:
        raise ValueError("its numbers of rows contradict each other")
    return groups


def _row_group(group: dict[int, Any]) -> RowGroup:
    chunks = {}
    for column in group[1]:
        about = column[3]
        name = b".".join(about[3]).decode()
        # Arrow begins with the dictionary, if there is one before the data.
        start = min(about[9], about.get(11) or about[9])
        chunks[name] = Chunk(start, about[7], about[1] in _BYTE_ARRAYS)
    if not group[3] >= 0:
        raise ValueError(_DAMAGED)
    return RowGroup(group[3], chunks)


def largest_page(file: BinaryIO, chunk: Chunk) -> int:
    """Returns the bytes of the largest page of a column chunk, unpacked.

    Args:
        file: the Parquet file.
        chunk: the part of it that is read.

    Raises:
        ValueError: a header is damaged, or the file ends too early.
    """
    largest, position = 0, chunk.start
    while position < chunk.start + chunk.size:
        file.seek(position)
        header = _struct(file)
        unpacked, packed = header.get(2), header.get(3)
        if type(unpacked) is not int or type(packed) is not int or min(unpacked, packed) < 0:
            raise ValueError(_DAMAGED)
        largest = max(largest, unpacked)
        position = file.tell() + packed
    return largest


# ---- Thrift -------------------------------------------------------------------------------------


def _struct(file: BinaryIO) -> dict[int, Any]:
    """Returns the values of a struct by the numbers of their fields."""
    found, field = {}, 0
    while head := _byte(file):
        field = field + (head >> 4) if head >> 4 else _number(file)
        if field in found:  # Arrow would merge the two
            raise ValueError(_DAMAGED)
        found[field] = _value(file, head & 15)
    return found


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE
    if kind in (_I16, _I32, _I64):
        return _number(file)
    if kind == _BINARY:
        return _bytes(file, _varint(file))
    if kind in (_LIST, _SET):
        return _list(file)
    if kind == _STRUCT:
        return _struct(file)
    if kind in (_BYTE, _DOUBLE):
        return _bytes(file, 1 if kind == _BYTE else 8)
    raise ValueError(_DAMAGED)


def _list(file: BinaryIO) -> list:
    head = _byte(file)
    count = _varint(file) if head >> 4 == 15 else head >> 4
    kind = head & 15
    # In a list, each bool has a byte of its own.
    kind = _BYTE if kind in (_TRUE, _FALSE) else kind
    return [_value(file, kind) for _ in range(count)]


def _number(file: BinaryIO) -> int:
    """Returns a whole number; small negative ones are also short in the file."""
    number = _varint(file)
    return (number >> 1) ^ -(number & 1)


def _varint(file: BinaryIO) -> int:
    number = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError(_DAMAGED)


def _byte(file: BinaryIO) -> int:
    return _bytes(file, 1)[0]


def _bytes(file: BinaryIO, count: int) -> bytes:
    found = file.read(count) if count <= _LONGEST else b""
    if len(found) < count or count > _LONGEST:
        raise ValueError(_DAMAGED)
    return found
