"""--mode=predict: a probability for every patch of files, folders, arrays or stores."""

import contextlib
import csv
import itertools
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bef_jax.data import inputs, sources
from bef_jax.data.inputs import Patch
from bef_jax.data.patch import deciding_side, tiling
from bef_jax.errors import UserError, printable
from bef_jax.runtime import files, lock, sharding
from bef_jax.scoring.heatmap import TileProbabilities, name_of, remove_heatmaps, write_heatmap
from bef_jax.scoring.probabilities_csv import csv_cell
from bef_jax.scoring.scorer import check_finite, make_predictor
from bef_jax.training import checkpoint

LOG = logging.getLogger(__name__)
_FILE, _MAPS, _STAGE = "predictions.csv", "heatmaps", ".predict.tmp"
_HEAD = ["id", "probability", "decision"]


class Prediction(NamedTuple):
    """A patch without its pixels, and its probability of class 1."""

    patch: Patch
    probability: float


def predict_files(
    config: ConfigDict,
    workdir: Path,
    checkpoint_path: Path,
    path: Path | None,
    split: str | None = None,
) -> dict:
    """Scores the input at `path`, and writes predictions.csv and heat maps into `workdir`.

    Args:
        config: as `trained.scoring_config` returns it for the checkpoint.
        checkpoint_path: the checkpoint's folder.
        path: the input, of a kind that `inputs.read` takes.
        split: one split of a store; None for all of them.

    Returns:
        The summary: mode, checkpoint, input, n, positives, unreadable (file and reason of each
        picture that can't be read), threshold, temperature, tta, operating_point, predictions,
        heatmaps, images_per_second. `operating_point` is what the run chose on the valid split, or
        None.

    Raises:
        UserError: the input or the checkpoint can't be used, or no output can be written.
        RunError: the log-odds of a patch are not finite. After either error, earlier predictions
            stay as they were.
    """
    _check_flags(path)
    files.check_outputs(workdir, [_FILE], [_MAPS, _STAGE])
    inputs.check(path, split, config.data.patch_size, sources.scale(config.data), lenient=True)
    start = time.perf_counter()
    unreadable: dict[str, str] = {}  # filled while patches are consumed
    patches = _shown(inputs.read(path, split, tiling(config), unreadable))
    with lock.held(workdir, ".predict.lock"), _stage(workdir) as stage:
        found = _write(stage, _predict(checkpoint_path, config, patches), config)
        if not found["n"]:
            raise UserError(f"--input={path}: {_none_readable(unreadable)}")
        _publish(stage, workdir)
    return {
        "mode": "predict",
        "checkpoint": str(checkpoint_path),
        "input": str(path),
        **found,
        "unreadable": [{"file": name, "reason": reason} for name, reason in unreadable.items()],
        "threshold": config.eval.threshold,
        "temperature": 1.0,  # the probabilities are the network's own; none is applied
        "tta": config.eval.tta,
        "operating_point": checkpoint.read_metadata(checkpoint_path).get("operating_point"),
        "predictions": str(workdir / _FILE),
        "heatmaps": [str(workdir / _MAPS / name) for name in found["heatmaps"]],
        # The time includes reading and compiling, because a user waits for them, too.
        "images_per_second": found["n"] / (time.perf_counter() - start),
    }


def _none_readable(unreadable: dict[str, str]) -> str:
    name, reason = next(iter(unreadable.items()))
    return f"none of its {len(unreadable)} pictures can be read; the first is {name}: {reason}"


def _check_flags(path: Path | None) -> None:
    if path is None:
        raise UserError("--input is missing: name a picture, a folder, a .npz, a .h5 or a store")
    # Each process would read the whole input and write the same file.
    if jax.process_count() > 1:
        raise UserError("--mode=predict runs in one process: give each host a part of the input")


@contextlib.contextmanager
def _stage(workdir: Path) -> Iterator[Path]:
    """Yields a folder for new outputs; earlier outputs stay until all new ones are made."""
    stage = workdir / _STAGE
    shutil.rmtree(stage, ignore_errors=True)  # left by a run that was killed
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, workdir: Path) -> None:
    """Moves the outputs to their place, and removes the heat maps of the earlier input."""
    if (workdir / _FILE).exists():
        LOG.info("replacing %s and the heat maps of an earlier run", workdir / _FILE)
    remove_heatmaps(workdir / _MAPS)
    os.replace(stage / _FILE, workdir / _FILE)
    for file in sorted(stage.rglob("*.png")):
        target = workdir / file.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def _shown(patches: Iterator[Patch]) -> Iterator[Patch]:
    """Passes patches on, and shows their number on stderr."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("predict")
        for count, patch in enumerate(patches, 1):
            yield patch
            if count % 256 == 0:  # drawing takes longer than passing a patch on
                bar.update(task, description=f"predict: {count:,} patches")


# ---- predicting ---------------------------------------------------------------------------------


def _predict(
    checkpoint_path: Path, config: ConfigDict, patches: Iterator[Patch]
) -> Iterator[Prediction]:
    """Predicts batch by batch, so that memory holds a few batches for any number of patches."""
    mesh = sharding.make_mesh()
    variables = checkpoint.restore_variables(checkpoint_path, config, sharding.replicated(mesh))
    predict = make_predictor(config, variables, mesh)
    waiting: deque[Patch] = deque()

    def pixels() -> Iterator[np.ndarray]:
        for patch in patches:
            # Drop the pixels, 27 kB a patch of 96 px, because the batch already holds them.
            waiting.append(patch._replace(pixels=None))
            yield patch.pixels

    for probabilities in predict(pixels()):
        predicted = [waiting.popleft() for _ in probabilities]
        check_finite(probabilities, [patch.id for patch in predicted])
        yield from map(Prediction, predicted, probabilities.tolist())


# ---- writing ------------------------------------------------------------------------------------


def _write(stage: Path, predictions: Iterator[Prediction], config: ConfigDict) -> dict:
    """Writes predictions.csv and heatmaps/ into `stage`; returns n, positives, and heatmaps."""
    with open(stage / _FILE, "w", newline="", encoding="utf-8") as file:
        return _write_rows(csv.writer(file), predictions, config, stage / _MAPS)


def _write_rows(
    out: Any, predictions: Iterator[Prediction], config: ConfigDict, folder: Path
) -> dict:
    """Writes a row for each patch, and a heat map of each picture that is larger than a patch."""
    threshold, n, positives = config.eval.threshold, 0, 0
    maps: dict[str, None] = {}  # a set that keeps the order
    out.writerow(_HEAD)
    # The tiles of a picture follow each other, so memory holds one map at a time. A patch that was
    # not cut from a picture has None as its picture.
    for picture, of_picture in itertools.groupby(predictions, key=lambda each: each.patch.picture):
        tiles = TileProbabilities(deciding_side(config))
        for patch, probability in of_picture:
            decision = int(probability >= threshold)
            out.writerow([csv_cell(printable(patch.id)), probability, decision])
            n, positives = n + 1, positives + decision
            if picture:
                tiles.add(patch.y, patch.x, probability)
        if picture:
            # The id of a tile is <name of the picture>:x=<x>:y=<y>.
            name = _new_name(patch.id.rsplit(":x=", 1)[0], maps)
            write_heatmap(folder / name, picture, tiles, threshold)
            maps[name] = None
    return {"n": n, "positives": positives, "heatmaps": list(maps)}


def _new_name(picture_name: str, taken: dict[str, None]) -> str:
    """Returns a free name for a picture's map."""
    # `name_of` turns a.tif into a.tif.png, and keeps a.tif.png, which may be there, too.
    name = name_of(picture_name)
    return name if name not in taken else name_of(f"{picture_name}.map")
