"""A table of pictures: the columns path and label and, if there are any, split and group."""

import csv
import io
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from bef_jax.data.chunk import Begin, Contents, silent
from bef_jax.data.patch import SPLITS
from bef_jax.data.sources.listing import (
    LISTED,
    SPLIT_NAMES,
    divide,
    group_finder,
    listed_identity,
    order_classes,
    table_lines,
)
from bef_jax.errors import UserError, listed, reason_of
from bef_jax.runtime.files import check_regular, open_user_file, sha256, user_path

_DELIMITERS = ",;\t"  # spreadsheets write semicolons where the comma is the decimal mark
_COLUMNS = ("path", "label", "split", "group")

DESCRIPTION = LISTED


def identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide what is read, and the table's checksum.

    A table is edited more often than it gets another name.
    """
    path = user_path(data.dir)
    if path.is_dir() and len(tables := _tables(path)) == 1:
        path = tables[0]
    return listed_identity(data) | ({"table": sha256(path)} if path.is_file() else {})


class _Row(NamedTuple):
    """A row of the table.

    Attributes:
        line: of the table, from 1.
        path: of the picture, as it is written.
        label: name of its class.
        split: one of SPLITS, or None if there is no such column.
        group: what patches of one slide or patient share; None if it is not known.
    """

    line: int
    path: str
    label: str
    split: str | None
    group: str | None


def home(data: ConfigDict) -> Path:
    """Returns the folder of the table, in which the store is put."""
    path = user_path(data.dir)
    return path if path.is_dir() else path.parent


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source: reads the whole table, and looks whether all files are there.

    The patches of a split come in the order of the table.

    Raises:
        UserError: the table or a row of it is wrong, a file is missing or listed twice, or the
            first picture is refused.
    """
    from bef_jax.data.sources import decode

    table = _find_table(user_path(data.dir))
    rows = list(_rows(table, data.group))
    folder = str(table.parent)  # a Path would be turned into text for each row
    files = [os.path.join(folder, row.path) for row in rows]
    classes = order_classes({row.label for row in rows}, data.classes, str(table))
    _check_listed_once(table, rows, files)
    _check_files(table, rows, files)
    numbers = {name: number for number, name in enumerate(classes)}
    pictures = [
        decode.Listed(file, numbers[row.label], row.path, row.group)
        for file, row in zip(files, rows, strict=True)
    ]
    splits = divide(data, pictures, _given_splits(rows), classes, str(table))
    return decode.open_listed(data, splits, classes, begin)


def _given_splits(rows: list[_Row]) -> dict[str, list[int]] | None:
    """Returns the places of each split in `rows`, or None if the table has no splits."""
    if not rows or rows[0].split is None:
        return None
    return {split: [i for i, row in enumerate(rows) if row.split == split] for split in SPLITS}


def _check_listed_once(table: Path, rows: list[_Row], files: list[str]) -> None:
    seen: set[str] = set()
    for row, file in zip(rows, files, strict=True):
        path = os.path.normpath(file)
        if path in seen:
            raise UserError(
                f"{table} line {row.line}: {row.path[:200]} has an earlier row; "
                "each patch needs exactly one row"
            )
        seen.add(path)


def _check_files(table: Path, rows: list[_Row], files: list[str]) -> None:
    """Checks that the files are there and are regular ones; opens none of them."""
    missing = [row for row, file in zip(rows, files, strict=True) if not os.path.isfile(file)]
    for row in missing:
        try:
            check_regular(table.parent / row.path)
        except UserError as error:
            raise UserError(f"{table} line {row.line}: {error}") from error
    if missing:
        raise UserError(
            f"{table} line {missing[0].line}: {missing[0].path[:200]} is missing, "
            f"the first of {len(missing)} of {len(rows)} files; "
            f"give paths relative to {table.parent}, or absolute"
        )


# ---- the table ----------------------------------------------------------------------------------


def _find_table(path: Path) -> Path:
    """Returns the table: `path` itself, or the only .csv file in this folder."""
    if not path.is_dir():
        return path
    tables = _tables(path)
    if len(tables) != 1:
        names = f" ({listed([file.name for file in tables])})" if tables else ""
        raise UserError(
            f"{path}: holds {len(tables)} .csv files{names}; set config.data.dir to the one to read"
        )
    return tables[0]


def _tables(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".csv")
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({reason_of(error)})") from error


def _rows(table: Path, group: str) -> Iterator[_Row]:
    """Yields the rows of the table; see `config.data.group` for `group`."""
    records = _records(table)
    _, header = next(records, (1, []))
    columns = _columns(header, group, table)
    find = None
    if group and "group" not in columns:
        find = group_finder(group, f"change the pattern, or name a column of {table.name}")
    shown = str(table)
    for line, fields in records:
        where = f"{shown} line {line}"
        if len(fields) != len(header):
            raise UserError(
                f"{where}: has {len(fields)} fields, but line 1 names {len(header)} columns; "
                "quote a field that holds the delimiter"
            )
        values = {name: fields[place].strip() for name, place in columns.items()}
        _check_values(values, where)
        # Intern names, so that a million rows share them.
        group_name = find(values["path"]) if find else values.get("group")
        yield _Row(
            line,
            values["path"],
            sys.intern(values["label"]),
            SPLIT_NAMES.get(values.get("split", "").lower()),
            group_name and sys.intern(group_name),
        )


def _columns(header: list[str], group: str, table: Path) -> dict[str, int]:
    """Returns the places of the columns that are read, by what they mean."""
    names = _plain(header)
    columns = {}
    for meaning in _COLUMNS:
        name = (group.strip().lower() or meaning) if meaning == "group" else meaning
        if name in names:
            columns[meaning] = names.index(name)
        elif meaning in ("path", "label"):
            raise UserError(
                f"{table}: has no column {name}; "
                f"line 1 must name path and label, but names {listed(names)[:200]}"
            )
        if names.count(name) > 1:
            raise UserError(f"{table}: has the column {name} twice; rename one")
    return columns


def _plain(header: list[str]) -> list[str]:
    return [name.strip().lower() for name in header]


def _check_values(values: dict[str, str], where: str) -> None:
    for name, value in values.items():
        if not value or "\0" in value:
            raise UserError(f"{where}: its {name} is {'not text' if value else 'empty'}")
    if "split" in values and values["split"].lower() not in SPLIT_NAMES:
        raise UserError(
            f"{where}: split {values['split'][:40]!r}; it must be one of {', '.join(SPLIT_NAMES)}"
        )


def _records(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, fields) of the header and of each row; skips empty lines."""
    line = 0
    try:
        with open_user_file(table) as file:
            # utf-8-sig drops the byte order mark that spreadsheets write first.
            lines = table_lines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), table)
            first = next(lines, "")
            whole = itertools.chain([first], lines)
            reader = csv.reader(
                whole, delimiter=_delimiter(first), skipinitialspace=True, strict=True
            )
            for fields in reader:
                line = reader.line_num
                if fields:
                    yield line, fields
    except FileNotFoundError as error:
        raise UserError(f"{table}: no such file; set config.data.dir to the .csv file") from error
    except UnicodeError as error:
        raise UserError(f"{table}: is not UTF-8 ({reason_of(error)}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(
            f"{table} line {line + 1}: cannot be read ({reason_of(error)}); close its quotes"
        ) from error
    except OSError as error:
        raise UserError(f"{table}: cannot be read ({reason_of(error)})") from error


def _delimiter(header: str) -> str:
    """Returns the delimiter that finds most of the known columns in the first line."""

    def known(delimiter: str) -> int:
        names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
        return len(set(_plain(names)) & set(_COLUMNS))

    return max(_DELIMITERS, key=known)
