"""Parquet files in the layout of Hugging Face's image data sets: the columns image and label.

`image` has the bytes of a picture file, alone or as `bytes` beside `path`. `label` has whole
numbers or text.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from bef_jax import hub
from bef_jax.data.chunk import Begin, Contents, silent
from bef_jax.data.sources.listing import LISTED, divide_places, listed_identity, order_classes
from bef_jax.data.sources.parquet.files import find, locate
from bef_jax.data.sources.parquet.rows import Rows, read_pictures, read_rows
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path

if TYPE_CHECKING:
    from bef_jax.data.sources.decode import Listed

DESCRIPTION = LISTED


def identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide what is read."""
    name = {"dir": data.dir} if data.dir.startswith(hub.PREFIX) else {}
    return listed_identity(data) | name


def home(data: ConfigDict) -> Path:
    """Returns the folder in which the store is put: that of the files, or data/OWNER--NAME."""
    if data.dir.startswith(hub.PREFIX):
        return Path("data") / data.dir.removeprefix(hub.PREFIX).replace("/", "--")
    path = user_path(data.dir)
    return path if path.is_dir() else path.parent


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source: fetches it if it is on a hub, and reads all rows without their pictures.

    The patches of a split come in the order of its files, which are sorted, and of their rows.

    Raises:
        UserError: the hub does not give it, a file is damaged or has other columns, a row has no
            label, the files have splits without train or valid, or the first picture is refused.
    """
    from bef_jax.data.sources import decode

    where = locate(data.dir)
    paths_of = find(where)
    rows = {path: read_rows(path, data.group) for paths in paths_of.values() for path in paths}
    if len({found.groups is None for found in rows.values()}) > 1:
        raise UserError(
            f"{where}: only some of its files have groups; give all of them this column, or none"
        )
    classes, numbers = _classes(list(rows.values()), data.classes, str(where))
    entries: list[Listed] = []
    given: dict[str | None, range] = {}
    for split, paths in paths_of.items():
        start = len(entries)
        entries += _entries({path: rows[path] for path in paths}, numbers)
        given[split] = range(start, len(entries))
    places = divide_places(data, entries, None if None in given else given, classes, str(where))
    starts = np.cumsum([0] + [len(found.labels) for found in rows.values()])
    pictures = {
        split: _Pictures(list(rows), starts, entries, np.asarray(found))
        for split, found in places.items()
    }
    return decode.open_listed(data, pictures, classes, begin)


def _classes(
    files: Sequence[Rows], wanted: Sequence[str], where: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the names of the classes, and the number of each label of the files.

    If the labels are numbers without names, `wanted` can name them. Otherwise the classes keep the
    order of the files' own names.
    """
    labels = {label for rows in files for label in rows.labels}
    names = {label: label for label in labels}
    if wanted and any(rows.is_numbered for rows in files) and not labels <= set(wanted):
        names = {label: _wanted_name(label, wanted, where) for label in labels}
    found = set(names.values())
    own = next((dict.fromkeys(rows.names) for rows in files if rows.names), {})
    order = wanted or ([name for name in own if name in found] if found <= own.keys() else ())
    classes = order_classes(found, order, where)
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, {label: numbers[name] for label, name in names.items()}


def _wanted_name(label: str, wanted: Sequence[str], where: str) -> str:
    if label not in map(str, range(len(wanted))):
        raise UserError(
            f"{where}: has the label {label[:100]}, but config.data.classes names {len(wanted)} "
            f"classes, 0 .. {len(wanted) - 1}"
        )
    return wanted[int(label)]


def _entries(files: Mapping[Path, Rows], numbers: Mapping[str, int]) -> Iterator["Listed"]:
    """Yields all patches of a split, or of all files if these have no splits."""
    from bef_jax.data.sources.decode import Listed

    paths = [path for rows in files.values() for path in rows.paths]
    has_ids = all(paths) and len(set(paths)) == len(paths)
    for file, rows in files.items():
        for row, label in enumerate(rows.labels):
            name = rows.paths[row] if has_ids else f"{file.stem}_{row}"
            group = rows.groups[row] if rows.groups else None
            yield Listed(str(file), numbers[label], name, group)


class _Pictures(Sequence):
    """The pictures of a split, which are read from the files while it is iterated."""

    def __init__(
        self, files: Sequence[Path], starts: np.ndarray, entries: list["Listed"], places: np.ndarray
    ):
        """Takes all files and patches, and which of the patches are in the split.

        Args:
            files: all, in order.
            starts: places in `entries` of the first row of each file, and the end; int64 [n + 1].
            entries: all patches.
            places: in `entries` of the patches of the split, ascending; int64 [m].
        """
        self._files, self._starts, self._entries, self._places = files, starts, entries, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: slice) -> "_Pictures":
        return _Pictures(self._files, self._starts, self._entries, self._places[rows])

    def __iter__(self) -> Iterator["Listed"]:
        for file, (start, end) in zip(self._files, itertools.pairwise(self._starts), strict=True):
            first, last = np.searchsorted(self._places, (start, end))
            if first == last:
                continue
            for row, content in read_pictures(file, self._places[first:last] - start):
                entry = self._entries[start + row]
                yield entry._replace(path=f"{file} row {row}", content=content)
