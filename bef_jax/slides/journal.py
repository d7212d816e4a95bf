"""The rows of blocks of a slide that are scored, saved one by one, so that a killed run goes on.

<folder>/plan.json      what decides the probabilities
<folder>/row_00012.npz  the windows of one row of blocks: rows, columns, probabilities
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bef_jax.errors import RunError, UserError
from bef_jax.runtime.files import open_user_file, read_json, replacing, write_json
from bef_jax.scoring.slide_scorer import Windows
from bef_jax.slides.tiles import Block, Grid, block_rows

LOG = logging.getLogger(__name__)
_PLAN = "plan.json"
_HEADS = 8 << 10  # bytes; the heads of a .npz with three arrays take less


@dataclass(frozen=True)
class Journal:
    """The saved rows of blocks of one slide.

    Attributes:
        folder: holds plan.json and the rows.
        rows: the blocks of all rows, saved or not.
        classes: that the network knows.
    """

    folder: Path
    rows: list[list[Block]]
    classes: int

    def file(self, number: int) -> Path:
        """Returns the file of a row of blocks."""
        return self.folder / f"row_{number:05d}.npz"

    def missing(self) -> list[int]:
        """Returns the numbers of the rows that are not saved, or whose file is damaged."""
        return [number for number in range(len(self.rows)) if self.load(number) is None]

    def save(self, number: int, windows: Windows) -> None:
        """Saves the windows of one row of blocks, whole or not at all."""
        with replacing(self.file(number)) as stream:
            np.savez(stream, **vars(windows))

    def load(self, number: int) -> Windows | None:
        """Returns the windows of a row of blocks; None if they are not saved, or damaged."""
        file = self.file(number)
        try:
            with open_user_file(file) as stream:
                windows = _read(stream, self._most_bytes(number))
            _check(windows, self.rows[number], self.classes)
        except FileNotFoundError:
            return None
        # NumPy and zipfile raise errors of any kind for a damaged file.
        except Exception as error:
            LOG.warning("%s: damaged (%s); its windows are scored again", file, error)
            return None
        return windows

    def windows(self) -> Iterator[Windows]:
        """Yields the windows of all rows of blocks in order.

        Raises:
            RunError: a row is not there any more.
        """
        for number in range(len(self.rows)):
            windows = self.load(number)
            if windows is None:
                raise RunError(f"{self.file(number)}: is gone; run the same command again")
            yield windows

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)

    def _most_bytes(self, number: int) -> int:
        columns = 1 if self.classes == 2 else self.classes
        return _HEADS + _count(self.rows[number]) * 8 * (1 + columns)


def open_journal(folder: Path, plan: dict, grid: Grid, classes: int) -> Journal:
    """Opens the journal of a slide; rows that were saved for another plan are removed.

    Args:
        folder: need not exist.
        plan: what decides the probabilities, as JSON.
        grid: of the slide.
        classes: that the network knows.
    """
    # Numbers and texts have to be as they come back from the file.
    plan = json.loads(json.dumps(plan))
    if folder.is_dir() and _read_plan(folder) != plan:
        LOG.info("%s: was made for other weights, fields or pixels; the slide starts again", folder)
        shutil.rmtree(folder)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        write_json(folder / _PLAN, plan)
    return Journal(folder, list(block_rows(grid)), classes)


def fingerprint(plan: dict) -> str:
    """Returns the sha256 of a plan, as hex digits."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _read_plan(folder: Path) -> dict | None:
    """Returns the plan of a folder; None if it has none, or a damaged one."""
    try:
        return read_json(folder / _PLAN, lambda _: None, "")
    except (FileNotFoundError, UserError):
        return None


def _count(blocks: list[Block]) -> int:
    return len(blocks[0].rows) * sum(len(block.columns) for block in blocks)


def _read(stream, most: int) -> Windows:
    """Reads the arrays of a file.

    Raises:
        Exception: the file is damaged. The checksums in it show that.
    """
    # A damaged head could ask for more memory than there is.
    if (size := stream.seek(0, 2)) > most:
        raise ValueError(f"{size:,} bytes, where {most:,} are the most")
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as arrays:
        return Windows(*(arrays[name] for name in ("rows", "columns", "probabilities")))


def _check(windows: Windows, blocks: list[Block], classes: int) -> None:
    """Raises ValueError unless these can be the windows of a row of blocks."""
    rows, columns, found = windows.rows, windows.columns, windows.probabilities
    shape = rows.shape if classes == 2 else (*rows.shape, classes)
    if rows.ndim != 1 or columns.shape != rows.shape or found.shape != shape:
        raise ValueError("an array has another shape")
    if (rows.dtype, columns.dtype, found.dtype) != (np.int32, np.int32, np.float64):
        raise ValueError("an array has another type")
    inside = blocks[0].rows, range(blocks[-1].columns.stop)
    for values, places in zip((rows, columns), inside, strict=True):
        if not np.all((places.start <= values) & (values < places.stop)):
            raise ValueError("a window lies elsewhere")
    places = rows.astype(np.int64) * inside[1].stop + columns
    if not np.all(np.diff(places) > 0):
        raise ValueError("the windows are not in order")
    if not np.all(np.isnan(found) | ((found >= 0) & (found <= 1))):
        raise ValueError("a probability is not in 0 .. 1")
