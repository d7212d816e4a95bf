"""Opens Parquet files, and reads their columns in batches of rows.

No file is trusted. It can declare more rows than it holds, and its pages can unpack to any size.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bef_jax.data.chunk import readable
from bef_jax.data.sources.parquet.footer import RowGroup, largest_page, read_footer
from bef_jax.errors import UserError, install_command
from bef_jax.runtime.files import check_regular, open_user_file

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

FIX = "fetch it again, or write it again"
_BUFFER = 1 << 20  # bytes that are read at once
_PAGE_LIMIT = 192 << 20  # bytes of a page, unpacked; Arrow can hold three copies of it
_BATCH_BYTES = 64 << 20  # the most that the values of a batch take, unless a single one takes more
_BATCH_ROWS = 1 << 16
_SMALLEST_PICTURE = 64  # bytes, if it is not one of many equal ones
_ROWS_ALWAYS_ALLOWED = 100_000


class File(NamedTuple):
    """An open file.

    Attributes:
        path: of the file.
        reader: Arrow's.
        groups: the row groups.
    """

    path: Path
    reader: "parquet.ParquetFile"
    groups: list[RowGroup]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[File]:
    """Opens a file, and checks that it can hold as many rows as it declares."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"config.data.source=parquet needs pyarrow: {install_command('hub')}"
        ) from error
    check_regular(path)
    with readable(path, FIX):
        groups = read_footer(path)
        count = sum(group.count for group in groups)
        # The labels and names of all rows will be in memory.
        if count > max(_ROWS_ALWAYS_ALLOWED, path.stat().st_size // _SMALLEST_PICTURE):
            raise UserError(f"{path}: declares {count} rows, which it cannot hold; {FIX}")
        # Without a buffer, Arrow would read a column chunk whole, and a file can be one chunk.
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as reader:
            yield File(path, reader, groups)


def batches(
    file: File, leaves: Sequence[str], numbers: Sequence[int]
) -> Iterator["pyarrow.RecordBatch"]:
    """Yields the rows of the columns `leaves`, of the row groups with these numbers."""
    if numbers:
        rows = _batch_rows(file, leaves, numbers)
        yield from file.reader.iter_batches(rows, numbers, leaves, use_threads=False)


def _batch_rows(file: File, leaves: Sequence[str], numbers: Sequence[int]) -> int:
    """Returns how many rows can be read at once; checks the sizes of the pages."""
    largest = 16
    with open_user_file(file.path) as stream:
        for number in numbers:
            for leaf in leaves:
                chunk = file.groups[number].chunks[leaf]
                size = largest_page(stream, chunk)
                if size > _PAGE_LIMIT:
                    raise UserError(
                        f"{file.path}: a page of {leaf} has {size} bytes, above {_PAGE_LIMIT}; "
                        "write it with smaller pages, and without a dictionary"
                    )
                # A value is in one page, and a dictionary's value can be in all rows.
                largest = max(largest, size if chunk.has_bytes else 0)
    return min(max(1, _BATCH_BYTES // largest), _BATCH_ROWS)
