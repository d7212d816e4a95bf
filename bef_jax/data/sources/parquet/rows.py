"""Reads the rows of a Parquet file: first labels, names and groups of all, later the pictures.

No file is trusted. It can declare more rows than it holds, and its pages can unpack to any size.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bef_jax.data.chunk import LONGEST_ID, readable
from bef_jax.data.sources.parquet.pages import largest_page
from bef_jax.errors import UserError, install_command, listed
from bef_jax.runtime.files import check_regular, open_user_file

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

_FIX = "fetch it again, or write it again"
_BUFFER = 1 << 20  # bytes that are read at once
_FOOTER_LIMIT = 16 << 20  # bytes; the objects that Arrow makes of them take many times as much
_PAGE_LIMIT = 192 << 20  # bytes of a page, unpacked; Arrow can hold three copies of it
_BATCH_BYTES = 64 << 20  # the most that the values of a batch take, unless a single one takes more
_BATCH_ROWS = 1 << 16
_LARGEST_PICTURE = 64 << 20  # bytes; more than the pixels of any picture that is decoded
_SMALLEST_PICTURE = 64  # bytes, if it is not one of many equal ones
_ROWS_ALWAYS_ALLOWED = 100_000


class Rows(NamedTuple):
    """The rows of a file, without the pictures.

    Attributes:
        labels: names of the classes; digits, if the file has numbers and does not name them.
        paths: where the pictures came from; empty where the file does not say it.
        groups: what patches of one slide or patient share; None if it is not known.
        names: of the classes in the order of their numbers; empty if the file does not name them.
        is_numbered: whether the labels are numbers without names.
    """

    labels: list[str]
    paths: list[str]
    groups: list[str] | None
    names: tuple[str, ...]
    is_numbered: bool


def read_rows(path: Path, group: str) -> Rows:
    """Reads all rows of a file, without the pictures.

    Args:
        path: of the file.
        group: the column of the groups; empty: the column `group`, if there is one.

    Raises:
        UserError: the file is damaged, a column is missing or of another type, or a row has no
            label or no group.
    """
    with _opened(path) as file:
        schema = file.schema_arrow
        _image_leaf(schema, path)
        leaves = ["label"] + ["image.path"] * _has_paths(schema)
        group = group or ("group" if "group" in schema.names else "")
        if group:
            _has_numbers(schema, group, path)
            leaves.append(group)
        names = _class_names(schema)
        is_numbered = _has_numbers(schema, "label", path) and not names
        found = Rows([], [], [] if group else None, names, is_numbered)
        for batch in _batches(file, path, leaves):
            _add(found, batch, group, path)
        return found


def _add(found: Rows, batch: "pyarrow.RecordBatch", group: str, path: Path) -> None:
    """Appends the rows of a batch."""
    nothing = [None] * len(batch)
    has_paths = "image" in batch.schema.names
    columns = (
        batch.column("label").to_pylist(),
        batch.column("image").field("path").to_pylist() if has_paths else nothing,
        batch.column(group).to_pylist() if group else nothing,
    )
    for row, (label, source, member) in enumerate(zip(*columns, strict=True), len(found.labels)):
        try:
            if found.groups is not None:
                found.groups.append(_group(member))
            found.labels.append(_label(label, found.names))
        except ValueError as error:
            raise UserError(f"{path} row {row}: {error}") from error
        found.paths.append(source if source and len(source) <= LONGEST_ID else "")


def read_pictures(path: Path, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Yields (row, the bytes of its picture) for some rows of a file; memory does not grow.

    Args:
        path: of the file.
        rows: numbers from 0, ascending, int64 [n].

    Raises:
        UserError: the file is damaged, or one of the rows has no picture.
    """
    with _opened(path) as file:
        leaf = _image_leaf(file.schema_arrow, path)
        start = 0
        for number in range(file.num_row_groups):
            end = start + file.metadata.row_group(number).num_rows
            wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]
            if len(wanted):
                for row, picture in _of_row_group(file, path, leaf, number, wanted - start):
                    yield start + row, _content(picture, f"{path} row {start + row}")
            start = end


def _of_row_group(
    file: "parquet.ParquetFile", path: Path, leaf: str, number: int, rows: np.ndarray
) -> Iterator[tuple[int, "pyarrow.Scalar"]]:
    """Yields (row, its picture), with rows counted from the start of the group."""
    start = 0
    for batch in _batches(file, path, [leaf], number):
        values = batch.column("image")
        values = values.field("bytes") if leaf == "image.bytes" else values
        end = start + len(values)
        for row in rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)].tolist():
            yield row, values[row - start]
        start = end
        if start > rows[-1]:
            return
    raise UserError(f"{path}: holds fewer rows than it declares; {_FIX}")


def _content(picture: "pyarrow.Scalar", where: str) -> bytes:
    size = picture.as_buffer().size if picture.is_valid else 0
    if not 0 < size <= _LARGEST_PICTURE:
        raise UserError(
            f"{where}: its image has {size} bytes; it must be a picture file of 1 .. "
            f"{_LARGEST_PICTURE}"
        )
    return picture.as_py()


# ---- the file -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["parquet.ParquetFile"]:
    """Opens a file whose number of rows is plausible."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"config.data.source=parquet needs pyarrow: {install_command('hub')}"
        ) from error
    check_regular(path)
    with readable(path, _FIX):
        _check_footer(path)
        # Without a buffer, Arrow would read a column chunk whole, and a file can be one chunk.
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            _check_counts(file.metadata, path)
            yield file


def _check_footer(path: Path) -> None:
    # The last eight bytes are the length of the footer and PAR1.
    with open_user_file(path) as file:
        file.seek(max(0, path.stat().st_size - 8))
        length = int.from_bytes(file.read(4), "little")
    if length > _FOOTER_LIMIT:
        raise UserError(f"{path}: its footer says that it has {length} bytes; {_FIX}")


def _check_counts(metadata: "parquet.FileMetaData", path: Path) -> None:
    counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise UserError(f"{path}: its numbers of rows contradict each other; {_FIX}")
    # The names and labels of all rows will be in memory.
    if metadata.num_rows > max(_ROWS_ALWAYS_ALLOWED, path.stat().st_size // _SMALLEST_PICTURE):
        raise UserError(f"{path}: declares {metadata.num_rows} rows, which it cannot hold; {_FIX}")


def _batches(
    file: "parquet.ParquetFile", path: Path, leaves: Sequence[str], number: int | None = None
) -> Iterator["pyarrow.RecordBatch"]:
    """Yields the rows of the columns `leaves`, of one row group or of all."""
    groups = range(file.num_row_groups) if number is None else [number]
    count = _batch_rows(file.metadata, path, leaves, groups)
    yield from file.iter_batches(count, row_groups=groups, columns=leaves, use_threads=False)


def _batch_rows(
    metadata: "parquet.FileMetaData", path: Path, leaves: Sequence[str], groups: Sequence[int]
) -> int:
    """Returns how many rows can be read at once; checks the pages."""
    largest = 1
    with open_user_file(path) as file:
        for number in groups:
            group = metadata.row_group(number)
            for chunk in map(group.column, range(group.num_columns)):
                if chunk.path_in_schema in leaves:
                    page = _largest_page(file, chunk, path)
                    # A value is in one page, and a dictionary's value can be in all rows.
                    largest = max(largest, page if "BYTE_ARRAY" in chunk.physical_type else 16)
    return min(max(1, _BATCH_BYTES // largest), _BATCH_ROWS)


def _largest_page(file, chunk: "parquet.ColumnChunkMetaData", path: Path) -> int:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    size = largest_page(file, start, chunk.total_compressed_size)
    if size > _PAGE_LIMIT:
        raise UserError(
            f"{path}: a page of {chunk.path_in_schema} has {size} bytes, above {_PAGE_LIMIT}; "
            "write it with smaller pages, and without a dictionary"
        )
    return size


# ---- columns ------------------------------------------------------------------------------------


def _image_leaf(schema: "pyarrow.Schema", path: Path) -> str:
    """Returns the name of the column of the pictures' bytes, as Parquet writes it."""
    kind = _type(schema, "image", path)
    is_nested = "bytes" in _parts(kind)
    if not _is_binary(_parts(kind)["bytes"] if is_nested else kind):
        raise UserError(
            f"{path}: its column image is {kind!s:.100}; "
            "it must hold the bytes of picture files, such as PNG"
        )
    return "image.bytes" if is_nested else "image"


def _has_paths(schema: "pyarrow.Schema") -> bool:
    parts = _parts(schema.field("image").type)
    return "path" in parts and _is_text(parts["path"])


def _parts(kind: "pyarrow.DataType") -> dict[str, "pyarrow.DataType"]:
    from pyarrow import types

    return {part.name: part.type for part in kind} if types.is_struct(kind) else {}


def _has_numbers(schema: "pyarrow.Schema", name: str, path: Path) -> bool:
    """Returns whether a column has whole numbers; it must have these or text."""
    from pyarrow import types

    kind = _type(schema, name, path)
    is_number = types.is_integer(kind) or types.is_boolean(kind)
    if not is_number and not _is_text(kind):
        raise UserError(
            f"{path}: its column {name} is {kind!s:.100}; it must be whole numbers or text"
        )
    return is_number


def _type(schema: "pyarrow.Schema", name: str, path: Path) -> "pyarrow.DataType":
    if (count := schema.names.count(name)) != 1:
        raise UserError(
            f"{path}: has {count or 'no'} column{'s' * (count > 1)} {name}; "
            f"its columns are {listed(schema.names)[:200]}"
        )
    return schema.field(name).type


def _is_binary(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _class_names(schema: "pyarrow.Schema") -> tuple[str, ...]:
    """Returns the names of the classes from the metadata of Hugging Face's `datasets`, or ()."""
    packed = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(packed)["info"]["features"]["label"]["names"]
    except (KeyError, TypeError):  # other metadata, or a label without names
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("its names of classes are not texts")
    return tuple(names)


# ---- values -------------------------------------------------------------------------------------


def _label(value: int | str | None, names: Sequence[str]) -> str:
    """Returns the name of the class; raises ValueError if there is none."""
    if value is None or value == "":
        raise ValueError("has no label")
    if isinstance(value, str):
        return sys.intern(value)
    if names and not 0 <= value < len(names):
        raise ValueError(f"label {value}, but there are names of {len(names)} classes")
    return names[value] if names else sys.intern(str(int(value)))


def _group(value: int | str | None) -> str:
    text = "" if value is None else str(value)
    if not text or len(text) > LONGEST_ID:
        raise ValueError(f"its group is empty, or has more than {LONGEST_ID} characters")
    return sys.intern(text)
