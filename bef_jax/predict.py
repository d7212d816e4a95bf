"""--mode=predict: a probability for every patch of files, folders, arrays or stores."""

import contextlib
import csv
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bef_jax import checkpoint, sharding, trained
from bef_jax.data import inputs
from bef_jax.data.inputs import Patch
from bef_jax.errors import UserError
from bef_jax.heatmap import Scores, write_heatmap
from bef_jax.scorer import make_predictor

LOG = logging.getLogger(__name__)
_HEAD = ["id", "probability", "decision"]


class Scored(NamedTuple):
    """A patch without its pixels, and its probability of class 1."""

    patch: Patch
    probability: float


def run(
    config: ConfigDict,
    workdir: Path,
    checkpoint_path: Path,
    path: Path | None,
    split: str | None = None,
) -> dict:
    """Scores what lies at `path`, and writes predictions.csv and heat maps into `workdir`.

    Args:
        config: as `trained.scoring_config` makes it for the checkpoint.
        checkpoint_path: the checkpoint's folder.
        path: of the input (`inputs.read`).
        split: of a store; all of them without it.

    Returns:
        The summary: mode, checkpoint, input, n, positives, threshold, temperature, tta,
        operating_point, predictions, heatmaps, wall_seconds, images_per_second. `operating_point`
        is what the run chose on valid, or None.

    Raises:
        UserError: the input or the checkpoint is not as it must be. Predictions of before then stay
            as they were.
    """
    _check_flags(path)
    inputs.check(path, split)
    start = time.perf_counter()
    patches = _shown(inputs.read(path, split, config.predict.stride))
    threshold = config.eval.threshold
    file = workdir / "predictions.csv"
    with _replacing(file) as out:
        scored = _score(checkpoint_path, config, patches)
        found = _write(out, scored, threshold, workdir / "heatmaps")
    # With reading and compiling, as whoever waits has it.
    seconds = time.perf_counter() - start
    return {
        "mode": "predict",
        "checkpoint": str(checkpoint_path),
        "input": str(path),
        **found,
        "threshold": threshold,
        "temperature": 1.0,
        "tta": config.eval.tta,
        "operating_point": checkpoint.read_run(checkpoint_path).get("operating_point"),
        "predictions": str(file),
        "wall_seconds": seconds,
        "images_per_second": found["n"] / seconds,
    }


def _check_flags(path: Path | None) -> None:
    if path is None:
        raise UserError("--input is missing: name a picture, a folder, a .npz, a .h5 or a store")
    # Each process would read the whole input, and write the same file.
    if jax.process_count() > 1:
        raise UserError("--mode=predict runs in one process: give each host a part of the input")


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator:
    """Gives a writer of CSV rows; the file appears, or is replaced, once all is written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        LOG.warning("%s is there: what it holds will be replaced", file)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        # A file's name need not be text; what is none is written as it is escaped.
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as out:
            yield csv.writer(out)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _shown(patches: Iterator[Patch]) -> Iterator[Patch]:
    """Passes patches on, and counts them on stderr."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("predict")
        for count, patch in enumerate(patches, 1):
            yield patch
            if count % 256 == 0:  # to draw takes longer than to pass a patch on
                bar.update(task, description=f"predict: {count:,} patches")


# ---- scoring ------------------------------------------------------------------------------------


def _score(path: Path, config: ConfigDict, patches: Iterator[Patch]) -> Iterator[Scored]:
    """Scores batch by batch: memory holds a few of them, however many patches come."""
    mesh = sharding.make_mesh()
    variables = trained.restore_variables(path, config, sharding.replicated(mesh))
    predict = make_predictor(config, variables, mesh)
    waiting: deque[Patch] = deque()

    def pixels() -> Iterator[np.ndarray]:
        for patch in patches:
            # Without the pixels, 27 kB a patch: their batch has them.
            waiting.append(patch._replace(pixels=None))
            yield patch.pixels

    for probabilities in predict(pixels()):
        for probability in probabilities.tolist():
            yield Scored(waiting.popleft(), probability)


# ---- writing ------------------------------------------------------------------------------------


def _write(out, scored: Iterator[Scored], threshold: float, folder: Path) -> dict:
    """Writes a row for each patch, and a heat map for each larger picture when it is through."""
    n = positives = 0
    maps: list[str] = []
    out.writerow(_HEAD)
    # The tiles of a picture come in a row, so that one map at a time is held.
    for picture, of_picture in itertools.groupby(scored, key=lambda each: each.patch.picture):
        tiles = Scores()
        for patch, probability in of_picture:
            decision = int(probability >= threshold)
            out.writerow([patch.id, probability, decision])
            n, positives = n + 1, positives + decision
            if picture:
                tiles.add(patch.y, patch.x, probability)
        if picture:
            # With its folders below the input: equal names in two of them do not meet.
            name = patch.id.rsplit(":x=", 1)[0]
            maps.append(str(write_heatmap(folder / f"{name}.png", picture, tiles, threshold)))
    return {"n": n, "positives": positives, "heatmaps": maps}
