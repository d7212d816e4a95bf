"""Reads the rows of a Parquet file: first labels, names and groups of all, later the pictures."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bef_jax.data.chunk import LONGEST_ID
from bef_jax.data.sources.parquet.batches import FIX, File, batches, opened
from bef_jax.errors import UserError, listed

if TYPE_CHECKING:
    import pyarrow

_LARGEST_PICTURE = 64 << 20  # bytes; more than the pixels of any picture that is decoded


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
    with opened(path) as file:
        schema = file.reader.schema_arrow
        _image_leaf(schema, path)
        leaves = ["label"] + ["image.path"] * _has_paths(schema)
        group = group or ("group" if "group" in schema.names else "")
        if group:
            _has_numbers(schema, group, path)
            leaves += [group] * (group != "label")
        names = _class_names(schema)
        is_numbered = _has_numbers(schema, "label", path) and not names
        found = Rows([], [], [] if group else None, names, is_numbered)
        for batch in batches(file, leaves, range(len(file.groups))):
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
    with opened(path) as file:
        leaf = _image_leaf(file.reader.schema_arrow, path)
        start = 0
        for number, group in enumerate(file.groups):
            end = start + group.count
            wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]
            if len(wanted):
                for row, picture in _of_row_group(file, leaf, number, wanted - start):
                    yield start + row, _content(picture, f"{path} row {start + row}")
            start = end


def _of_row_group(
    file: File, leaf: str, number: int, rows: np.ndarray
) -> Iterator[tuple[int, "pyarrow.Scalar"]]:
    """Yields (row, its picture), with rows counted from the start of the group."""
    start = 0
    for batch in batches(file, [leaf], [number]):
        values = batch.column("image")
        values = values.field("bytes") if leaf == "image.bytes" else values
        end = start + len(values)
        for row in rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)].tolist():
            yield row, values[row - start]
        start = end
        if start > rows[-1]:
            return
    raise UserError(f"{file.path}: holds fewer rows than it declares; {FIX}")


def _content(picture: "pyarrow.Scalar", where: str) -> bytes:
    size = picture.as_buffer().size if picture.is_valid else 0
    if not 0 < size <= _LARGEST_PICTURE:
        raise UserError(
            f"{where}: its image has {size} bytes; it must be a picture file of 1 .. "
            f"{_LARGEST_PICTURE}"
        )
    return picture.as_py()


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
