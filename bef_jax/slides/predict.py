"""The slides of --mode=predict: each is read and scored row by row, and gets a folder of results.

A row of blocks that is scored is saved, so a run that is killed goes on inside the slide.
"""

import contextlib
import csv
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bef_jax.config import as_json, flatten
from bef_jax.configs.fields import INPUT, NETWORK, SCORE, affects
from bef_jax.data.patch import class_names, tiling
from bef_jax.errors import RunError, UserError, printable, reason_of
from bef_jax.runtime import progress
from bef_jax.runtime.files import check_outputs, check_types, read_json, replacing, write_json
from bef_jax.runtime.interrupt import Interrupt
from bef_jax.runtime.versions import versions_of_slides
from bef_jax.scoring.probabilities_csv import csv_cell
from bef_jax.scoring.slide_scorer import Network, Windows, score_row
from bef_jax.slides.journal import Journal, fingerprint, open_journal
from bef_jax.slides.outputs import write_outputs
from bef_jax.slides.reader import Slide, open_slide
from bef_jax.slides.tiles import Block, Grid, make_grid

LOG = logging.getLogger(__name__)

TABLE, FOLDER, PAGE = "slides.csv", "slides", "slides.html"
_RECORD, _PARTIAL = "slide.json", ".partial"
_FORMAT = 1  # of the journal and of the results; another number scores all slides again
_COLUMNS = (
    "name", "file", "status", "score", "lesion_class", "largest_lesion_um", "windows", "failed",
    "positives", "tissue_share", "width", "height", "mpp", "level", "error",
)  # fmt: skip


class Source(NamedTuple):
    """A slide of the input, looked at before any is scored.

    Attributes:
        name: of its folder in WORKDIR/slides; it may have slashes.
        path: of its file.
        tiles: its area, divided by that of a tile.
        refused: why it cannot be scored; None if it can.
    """

    name: str
    path: Path
    tiles: float
    refused: str | None

    @property
    def file(self) -> str:
        """Returns the path of its file below the input, with slashes."""
        return (PurePosixPath(self.name).parent / self.path.name).as_posix()


def look_at_slides(config: ConfigDict, slides: Iterable[tuple[str, Path]]) -> list[Source]:
    """Opens each slide for a moment, and returns what is known of it.

    Args:
        config: as `trained.scoring_config` returns it for the checkpoint.
        slides: names and files.
    """
    return [_look(config, name, path) for name, path in slides]


def _look(config: ConfigDict, name: str, path: Path) -> Source:
    try:
        with _opened(config, path) as (_, grid):
            return Source(name, path, _tiles(grid), None)
    except UserError as error:
        return Source(name, path, 0.0, _reason(error, path))


@contextlib.contextmanager
def _opened(config: ConfigDict, path: Path) -> Iterator[tuple[Slide, Grid]]:
    """Yields an open slide and its windows.

    Raises:
        UserError: it cannot be read, or its scale and that of the network don't fit.
    """
    if not config.data.mpp:
        raise UserError(
            f"{path}: the network does not know the um per pixel of its patches, which slides "
            "need; give --config.data.mpp=..."
        )
    with open_slide(path, config.slides.mpp or None) as slide:
        yield slide, make_grid(slide, tiling(config), config.data.mpp)


def predict_slides(
    config: ConfigDict,
    workdir: Path,
    checkpoint_path: Path,
    network: Network,
    sources: Sequence[Source],
) -> dict:
    """Scores slides, and writes WORKDIR/slides/NAME/, slides.csv and slides.html.

    Args:
        config: as `trained.scoring_config` returns it for the checkpoint.
        checkpoint_path: the checkpoint's folder.
        network: that scores their windows.
        sources: as `look_at_slides` returns them.

    Returns:
        A part of the summary: `n` (windows scored), `positives`, `counts` for more than two
        classes, `unreadable` (files and reasons) and `slides`.

    Raises:
        RunError: the network's scores are not finite, or a signal asked the run to stop.
    """
    # Imported here, because bef_jax.report imports matplotlib and scikit-learn. They take a second,
    # and a run without slides draws no page.
    from bef_jax.report.slides_page import write_slides_page

    meter = _Meter()
    shown = [source for source in sources if source.refused is None]
    with (
        Interrupt() as interrupt,
        progress.Slides(len(shown), sum(source.tiles for source in shown)) as bar,
    ):
        work = _Work(config, workdir, checkpoint_path, network, meter, interrupt, bar)
        records = [_record(work, source) for source in sources]
    records.sort(key=lambda record: record["name"])
    _write_table(workdir / TABLE, records)
    page = write_slides_page(workdir, records)
    return _summary(config, records, {"table": str(workdir / TABLE), "page": str(page)}, meter)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the slides of a run share."""

    config: ConfigDict
    workdir: Path
    checkpoint_path: Path
    network: Network
    meter: "_Meter"
    interrupt: Interrupt
    bar: progress.Slides


# ---- one slide ----------------------------------------------------------------------------------


def _record(work: _Work, source: Source) -> dict:
    """Returns what slide.json says of a slide; or name, file and error of one that has failed."""
    try:
        if source.refused is not None:
            raise UserError(source.refused)
        return _of_slide(work, source)
    except UserError as error:
        reason = _reason(error, source.path)
        LOG.warning("%s: %s", source.file, reason)
        return {"name": source.name, "file": source.file, "error": reason}


def _of_slide(work: _Work, source: Source) -> dict:
    """Scores a slide, unless that was done, and writes its folder."""
    start, config = time.perf_counter(), work.config
    work.bar.begin(printable(source.file), source.tiles)
    folder = work.workdir / FOLDER / source.name
    with _opened(config, source.path) as (slide, grid):
        plan = _plan(work, source.path, grid)
        mark = fingerprint(plan | {"outputs": _output_fields(config)})
        if record := _earlier(folder, mark):
            # A kill right after slide.json was written leaves the rows.
            shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
            return record
        _prepare(folder)
        # Another engine rounds in another way, so it does not go on with the rows of this one. A
        # slide that is done stays done.
        plan |= {"engine": work.network.engine}
        journal = open_journal(folder / _PARTIAL, plan, grid, config.model.num_classes)
        _score(work, source, slide, grid, journal)
        facts = write_outputs(folder, slide, grid, journal.windows, config)
        known = _known(work, source, slide, mark)
    record = known | {"seconds": time.perf_counter() - start} | facts | {"name": source.name}
    write_json(folder / _RECORD, record)
    journal.remove()
    return record


def _score(work: _Work, source: Source, slide: Slide, grid: Grid, journal: Journal) -> None:
    """Scores and saves the rows of blocks that are not saved."""
    missing = journal.missing()
    tiles = _tiles(grid) / max(1, len(journal.rows))
    work.bar.saved(tiles * (len(journal.rows) - len(missing)))
    for number in missing:
        if work.interrupt.requested:
            raise RunError(
                f"stopped in {source.file}, before row of blocks {number + 1} of "
                f"{len(journal.rows)} ({work.bar.place}); the same command goes on there"
            )
        with work.meter.row(tiles):
            windows = _score_row(work, slide, grid, journal.rows[number], tiles)
        work.meter.windows += len(windows.rows)
        journal.save(number, windows)


def _score_row(work: _Work, slide: Slide, grid: Grid, blocks: list[Block], tiles: float) -> Windows:
    """Scores a row of blocks, whose area is given in tiles."""

    def wait(seconds: float) -> None:
        work.meter.waited += seconds
        work.bar.advance(tiles / len(blocks))

    return score_row(work.network.predict, slide, grid, blocks, work.config.model.num_classes, wait)


def _prepare(folder: Path) -> None:
    """Makes the folder of a slide, and removes what would claim that it is done.

    Raises:
        UserError: it cannot be written.
    """
    check_outputs(folder.parent, output_folders=[folder.name])
    folder.mkdir(parents=True, exist_ok=True)
    check_outputs(folder, [_RECORD], [_PARTIAL])
    (folder / _RECORD).unlink(missing_ok=True)
    for file in folder.glob(".tmp-*"):  # a run that was killed leaves what it was writing
        file.unlink()


def _plan(work: _Work, path: Path, grid: Grid) -> dict:
    """Returns what decides the probabilities of a slide, as JSON.

    Raises:
        UserError: its file is gone.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from error
    fields = flatten(ConfigDict(as_json(work.config)))
    plan = {
        "format": _FORMAT,
        "file": {"name": printable(path.name), "size": facts.st_size, "time": facts.st_mtime_ns},
        "grid": dataclasses.asdict(grid),
        "classes": class_names(work.config),
        "weights": work.network.digest,
        "fields": {k: x for k, x in fields.items() if affects(k) in (NETWORK, INPUT, SCORE)},
    }
    # The threshold decides what is made of probabilities, but not the probabilities.
    plan["fields"].pop("eval.threshold")
    return json.loads(json.dumps(plan))


def _output_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that decide what is made of the probabilities."""
    return {"eval.threshold": config.eval.threshold} | flatten(config.slides, "slides.")


def _known(work: _Work, source: Source, slide: Slide, mark: str) -> dict:
    """Returns the part of slide.json that does not come from the outputs."""
    config = work.config
    return {
        "name": source.name,
        "file": source.file,
        "reader": slide.reader,
        "classes": list(class_names(config)),
        "threshold": config.eval.threshold if config.model.num_classes == 2 else None,
        "tta": config.eval.tta,
        "engine": work.network.engine,
        "checkpoint": str(work.checkpoint_path),
        "fingerprint": mark,
        "versions": versions_of_slides(),
    }


def _earlier(folder: Path, mark: str) -> dict | None:
    """Returns slide.json if an earlier run has made the same results; else None."""
    try:
        record = read_json(folder / _RECORD, _check_record, "the slide is done again")
    except FileNotFoundError:
        return None
    except UserError as error:
        LOG.warning("%s", error)
        return None
    return record if record["fingerprint"] == mark else None


def _check_record(found: Any) -> None:
    check_types(found, name=str, file=str, reader=str, classes=list, fingerprint=str, grid=dict)
    check_types(found, windows=int, failed=int, width=int, height=int, level=int, mpp=float)
    check_types(found, tissue_share=float, seconds=float, versions=dict)
    optional = int | float | None
    check_types(found, positives=int | None, score=optional, largest_lesion_um=optional)
    check_types(found, lesion_class=str | None)
    if found["positives"] is None:
        check_types(found, counts=dict)
        check_types(found["counts"], **dict.fromkeys(found["classes"], int))


def _tiles(grid: Grid) -> float:
    return grid.width * grid.height / grid.tiling.side**2


def _reason(error: UserError, path: Path) -> str:
    return str(error).removeprefix(printable(f"{path}: "))


# ---- all slides ---------------------------------------------------------------------------------


def _write_table(file: Path, records: Iterable[dict]) -> None:
    with replacing(file, "w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(_COLUMNS)
        for record in records:
            row = record | {"status": "failed" if "error" in record else "done"}
            out.writerow([_cell(row.get(column)) for column in _COLUMNS])


def _cell(value: Any) -> Any:
    return csv_cell(printable(value)) if isinstance(value, str) else value


def _summary(
    config: ConfigDict, records: Sequence[dict], places: dict[str, str], meter: "_Meter"
) -> dict:
    done = [record for record in records if "error" not in record]
    windows, failed = (sum(record[key] for record in done) for key in ("windows", "failed"))
    is_binary = config.model.num_classes == 2
    found = {
        "n": windows - failed,
        "positives": sum(record["positives"] for record in done) if is_binary else None,
    }
    if not is_binary:
        names = class_names(config)
        found["counts"] = {x: sum(record["counts"][x] for record in done) for x in names}
    figures = {
        "n": len(records),
        "done": len(done),
        "failed": len(records) - len(done),
        "windows": windows,
        "failed_windows": failed,
        "saved_windows": max(0, windows - meter.windows),
    }
    return found | {
        "unreadable": [problem for record in records if (problem := _problem(record))],
        "slides": figures | places | meter.figures(),
    }


def _problem(record: dict) -> dict | None:
    """Returns the file and the reason of a slide that could not be read, or not in full."""
    reason = record.get("error")
    if reason is None and record["failed"]:
        reason = f"{record['failed']:,} of {record['windows']:,} windows cannot be decoded"
    return reason and {"file": record["file"], "reason": reason}


class _Meter:
    """The speed of scoring, and the share of the time in which the network waited for pixels.

    Attributes:
        waited: seconds of waiting since the present row of blocks began.
        windows: that this run has read; others were saved by an earlier one.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self.windows = 0
        self._rows: list[tuple[float, float, float]] = []  # tiles, seconds, seconds of waiting

    @contextlib.contextmanager
    def row(self, tiles: float) -> Iterator[None]:
        """Measures the body, which scores a row of blocks of this area."""
        self.waited, start = 0.0, time.perf_counter()
        yield
        self._rows.append((tiles, time.perf_counter() - start, self.waited))

    def figures(self) -> dict[str, float | None]:
        """Returns both figures; None if no row of blocks was scored."""
        # The first row compiles the network, so it counts only if it is the only one.
        rows = self._rows[1:] or self._rows
        if not rows:
            return {"input_wait_fraction": None, "tiles_per_second": None}
        tiles, seconds, waited = map(sum, zip(*rows, strict=True))
        return {"input_wait_fraction": waited / seconds, "tiles_per_second": tiles / seconds}
