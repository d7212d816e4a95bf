"""--mode=predict: a probability for every patch of slides, pictures, arrays or stores."""

import contextlib
import csv
import itertools
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bef_jax.data import inputs
from bef_jax.data.inputs import Patch
from bef_jax.data.patch import class_names, deciding_side, tiling
from bef_jax.errors import UserError, printable
from bef_jax.runtime import files, lock, sharding
from bef_jax.scoring.engines.predictor import EngineScorer
from bef_jax.scoring.heatmap import (
    ClassTiles,
    TileProbabilities,
    name_of,
    remove_heatmaps,
    write_class_maps,
    write_heatmap,
)
from bef_jax.scoring.probabilities_csv import csv_cell
from bef_jax.scoring.scorer import check_finite, make_predictor
from bef_jax.scoring.slide_scorer import Network, Predict, for_slides
from bef_jax.slides.predict import FOLDER, PAGE, TABLE, Source, look_at_slides, predict_slides
from bef_jax.training import checkpoint
from bef_jax.training.state import params_digest

LOG = logging.getLogger(__name__)
_FILE, _MAPS, _STAGE = "predictions.csv", "heatmaps", ".predict.tmp"
# The part of the summary that depends on the input, as it is before anything was scored.
_NOTHING = {
    "n": 0,
    "positives": None,
    "unreadable": [],
    "predictions": None,
    "heatmaps": [],
    "slides": None,
}


class Prediction(NamedTuple):
    """A patch without its pixels, and its probability of class 1, or float64 [K] for K > 2."""

    patch: Patch
    probability: float | np.ndarray


def predict_files(
    config: ConfigDict,
    workdir: Path,
    checkpoint_path: Path,
    path: Path | None,
    split: str | None = None,
) -> dict:
    """Scores the input at `path`, and writes what was found into `workdir`.

    Patches and pictures give predictions.csv and heat maps; for slides, see `predict_slides`.

    Args:
        config: as `trained.scoring_config` returns it for the checkpoint.
        checkpoint_path: the checkpoint's folder.
        path: a slide, a folder with slides or pictures or both, or what else `inputs.read` takes.
        split: one split of a store; None for all of them.

    Returns:
        The summary: mode, checkpoint, input, n, positives, unreadable (file and reason of each
        picture or slide that can't be read, or not in full), threshold, temperature, tta, engine,
        operating_point, predictions, heatmaps, slides, images_per_second. `operating_point` is
        what the run chose on the valid split, or None. For more than two classes, positives and
        threshold are None, and `counts` says how many patches are called each class. Without
        slides, `slides` is None; where no picture was scored, `predictions` is.

    Raises:
        UserError: the input or the checkpoint can't be used, or no output can be written.
        RunError: the scores of a patch are not finite, or a signal stopped the run in a slide.
            After either error, earlier predictions stay as they were.
    """
    _check_flags(path)
    files.check_outputs(workdir, [_FILE], [_MAPS, _STAGE])
    sources, pictures = _look(config, workdir, path, split)
    start = time.perf_counter()
    with lock.held(workdir, ".predict.lock"):
        mesh = sharding.make_mesh()
        everywhere = sharding.replicated(mesh)
        variables = checkpoint.restore_variables(checkpoint_path, config, everywhere)
        scorer = EngineScorer(config, variables, mesh)
        predict = make_predictor(config, scorer, mesh)
        found = _NOTHING
        if pictures != []:
            is_needed = not any(source.refused is None for source in sources)
            found = _predict_patches(config, workdir, path, split, pictures, predict, is_needed)
        if sources:
            scorer.expect(int(sum(source.tiles for source in sources)))
            digest = params_digest(variables["params"], variables.get("batch_stats", {}))
            network = Network(digest, scorer.engine, for_slides(predict, config, mesh))
            of_slides = predict_slides(config, workdir, checkpoint_path, network, sources)
            found = _sum(found, of_slides)
        _warn_of_earlier(workdir, found)
    saved = found["slides"]["saved_windows"] if found["slides"] else 0  # by an earlier run
    return {
        "mode": "predict",
        "checkpoint": str(checkpoint_path),
        "input": str(path),
        **found,
        "threshold": config.eval.threshold if config.model.num_classes == 2 else None,
        "temperature": 1.0,  # the probabilities are the network's own; none is applied
        "tta": config.eval.tta,
        "engine": scorer.engine,
        "operating_point": checkpoint.read_metadata(checkpoint_path).get("operating_point"),
        # The time includes reading and compiling, because a user waits for them, too.
        "images_per_second": max(0, found["n"] - saved) / (time.perf_counter() - start),
    }


def _check_flags(path: Path | None) -> None:
    if path is None:
        raise UserError(
            "--input is missing: name a slide, a picture, a folder, a .npz, a .h5 or a store"
        )
    # Each process would read the whole input and write the same file.
    if jax.process_count() > 1:
        raise UserError("--mode=predict runs in one process: give each host a part of the input")


def _look(
    config: ConfigDict, workdir: Path, path: Path, split: str | None
) -> tuple[list[Source], list[Path] | None]:
    """Returns the slides and the pictures of an input; see `inputs.divide`.

    Raises:
        UserError: nothing of it can be scored, or no output can be written.
    """
    side, mpp = config.data.patch_size, config.data.mpp or None
    slides, pictures = inputs.divide(path, split, side, mpp, config.slides.mpp or None)
    sources = look_at_slides(config, slides)
    is_enough = any(source.refused is None for source in sources)
    if sources:
        files.check_outputs(workdir, [TABLE, PAGE], [FOLDER])
    if pictures or not sources:
        try:
            inputs.check(path, split, side, mpp, lenient=True, only=pictures or None)
        except UserError:
            if not is_enough:
                raise
    elif not is_enough:
        raise UserError(f"{sources[0].path}: {sources[0].refused}")
    return sources, pictures


def _sum(of_patches: dict, of_slides: dict) -> dict:
    """Returns what was found in patches and slides together."""
    found = of_patches | {"n": of_patches["n"] + of_slides["n"], "slides": of_slides["slides"]}
    found["unreadable"] = of_patches["unreadable"] + of_slides["unreadable"]
    if (positives := of_slides["positives"]) is not None:
        found["positives"] = (of_patches["positives"] or 0) + positives
    if counts := of_slides.get("counts"):
        found["counts"] = {
            name: count + of_patches.get("counts", {}).get(name, 0)
            for name, count in counts.items()
        }
    return found


def _warn_of_earlier(workdir: Path, found: dict) -> None:
    """Names the tables that an earlier run left there, because they are not of this input."""
    for name, key in ((_FILE, "predictions"), (TABLE, "slides")):
        if not found[key] and (workdir / name).exists():
            LOG.warning("%s: is of an earlier run, as this one had no input for it", workdir / name)


# ---- patches and pictures -----------------------------------------------------------------------


def _predict_patches(
    config: ConfigDict,
    workdir: Path,
    path: Path,
    split: str | None,
    pictures: list[Path] | None,
    predict: Predict,
    is_needed: bool,
) -> dict:
    """Scores all of the input but its slides; returns its part of the summary.

    Args:
        pictures: see `inputs.divide`.
        predict: the network.
        is_needed: it is an error if none of the pictures can be read.
    """
    unreadable: dict[str, str] = {}  # filled while patches are consumed
    mpp = config.data.mpp or None
    patches = _shown(inputs.read(path, split, tiling(config), mpp, unreadable, pictures))
    with _stage(workdir) as stage:
        found = _write(stage, _predict(predict, patches), config)
        if found["n"]:
            _publish(stage, workdir)
        elif is_needed:
            raise UserError(f"--input={path}: {_none_readable(unreadable)}")
    return (
        _NOTHING
        | found
        | {
            "unreadable": [{"file": name, "reason": reason} for name, reason in unreadable.items()],
            "predictions": str(workdir / _FILE) if found["n"] else None,
            "heatmaps": [str(workdir / _MAPS / name) for name in found["heatmaps"]],
        }
    )


def _none_readable(unreadable: dict[str, str]) -> str:
    name, reason = next(iter(unreadable.items()))
    return f"none of its {len(unreadable)} pictures can be read; the first is {name}: {reason}"


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
    # Leave out folders: that of the maps of big.png has this name, too.
    maps = sorted(path for path in stage.rglob("*.png") if path.is_file())
    remove_heatmaps(workdir / _MAPS)
    # A file of the user's may have the name of a map, or of its folder.
    names = [path.relative_to(stage) for path in maps]
    files.check_outputs(workdir, map(str, names), {str(name.parent) for name in names})
    os.replace(stage / _FILE, workdir / _FILE)
    for file in maps:
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


def _predict(predict: Predict, patches: Iterator[Patch]) -> Iterator[Prediction]:
    """Predicts batch by batch, so that memory holds a few batches for any number of patches."""
    waiting: deque[Patch] = deque()

    def pixels() -> Iterator[np.ndarray]:
        for patch in patches:
            # Drop the pixels, 27 kB a patch of 96 px, because the batch already holds them.
            waiting.append(patch._replace(pixels=None))
            yield patch.pixels

    for probabilities in predict(pixels()):
        predicted = [waiting.popleft() for _ in probabilities]
        check_finite(probabilities, [patch.id for patch in predicted])
        # Rows of probabilities stay arrays, because lists take four times as much memory.
        is_binary = probabilities.ndim == 1
        yield from map(
            Prediction, predicted, probabilities.tolist() if is_binary else probabilities
        )


# ---- writing ------------------------------------------------------------------------------------


def _write(stage: Path, predictions: Iterator[Prediction], config: ConfigDict) -> dict:
    """Writes predictions.csv and heatmaps/ into `stage`; returns their part of the summary."""
    with open(stage / _FILE, "w", newline="", encoding="utf-8") as file:
        return _write_rows(csv.writer(file), predictions, config, stage / _MAPS)


def _write_rows(
    out: Any, predictions: Iterator[Prediction], config: ConfigDict, folder: Path
) -> dict:
    """Writes a row for each patch, and heat maps of each picture that is larger than a patch.

    Returns:
        n, positives, for more than two classes `counts`, and heatmaps.
    """
    classes, threshold = class_names(config), config.eval.threshold
    counts, is_binary = [0] * len(classes), len(classes) == 2
    maps: dict[str, None] = {}  # a set that keeps the order
    out.writerow(_head(classes))
    # The tiles of a picture follow each other, so memory holds one map at a time. A patch that was
    # not cut from a picture has None as its picture.
    for picture, of_picture in itertools.groupby(predictions, key=lambda each: each.patch.picture):
        tiles = (TileProbabilities if is_binary else ClassTiles)(deciding_side(config))
        for patch, probability in of_picture:
            decision = int(probability >= threshold if is_binary else probability.argmax())
            counts[decision] += 1
            out.writerow(_row(patch.id, probability, decision, classes))
            if picture:
                tiles.add(patch.y, patch.x, probability)
        if picture:
            # The id of a tile is <name of the picture>:x=<x>:y=<y>.
            name = patch.id.rsplit(":x=", 1)[0]
            maps |= dict.fromkeys(_draw(folder, name, picture, tiles, config, maps))
    found = {"n": sum(counts), "positives": counts[1] if is_binary else None}
    if not is_binary:
        found["counts"] = dict(zip(classes, counts, strict=True))
    return found | {"heatmaps": list(maps)}


def _head(classes: Sequence[str]) -> list[str]:
    if len(classes) == 2:
        return ["id", "probability", "decision"]
    return ["id", "decision", *(printable(f"probability_{name}") for name in classes)]


def _row(
    name: str, probability: float | np.ndarray, decision: int, classes: Sequence[str]
) -> list[Any]:
    name = csv_cell(printable(name))
    if len(classes) == 2:
        return [name, probability, decision]
    return [name, csv_cell(printable(classes[decision])), *probability.tolist()]


def _draw(
    folder: Path,
    name: str,
    picture: Path,
    tiles: TileProbabilities | ClassTiles,
    config: ConfigDict,
    taken: dict[str, None],
) -> list[str]:
    """Draws the maps of a picture, and returns their names below `folder`."""
    classes = class_names(config)
    if isinstance(tiles, ClassTiles):
        # A folder of the picture's own name is free, because no other picture has that name.
        return [
            f"{name}/{file}" for file in write_class_maps(folder / name, picture, tiles, classes)
        ]
    name = _new_name(name, taken)
    write_heatmap(folder / name, picture, tiles, config.eval.threshold, classes)
    return [name]


def _new_name(picture_name: str, taken: dict[str, None]) -> str:
    """Returns a free name for a picture's map."""
    # `name_of` turns a.tif into a.tif.png, and keeps a.tif.png, which may be there, too.
    name = name_of(picture_name)
    return name if name not in taken else name_of(f"{picture_name}.map")
