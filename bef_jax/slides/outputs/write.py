"""Writes all files of one slide, and returns what they say in short."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.patch import class_names
from bef_jax.scoring.slide_scorer import Windows
from bef_jax.slides.outputs.detections import write_detections
from bef_jax.slides.outputs.maps import layer_of, write_heatmap, write_mask, write_probability
from bef_jax.slides.outputs.regions import find_regions, lesion_class, write_regions
from bef_jax.slides.outputs.tiles_csv import write_tiles
from bef_jax.slides.outputs.window_map import WindowMap, gather
from bef_jax.slides.reader import Slide
from bef_jax.slides.tiles import Grid

_DETECTIONS = "detections.csv"


def write_outputs(
    folder: Path,
    slide: Slide,
    grid: Grid,
    windows: Callable[[], Iterator[Windows]],
    config: ConfigDict,
) -> dict[str, Any]:
    """Writes tiles.csv.gz, probability.tif, mask.png, heatmap.png, regions and detections.

    The same windows give the same bytes. Each file appears whole, or not at all. Memory grows with
    the grid, not with the pixels of the slide. More than two classes have no detections.csv.

    Args:
        folder: of this slide; it is made.
        windows: returns an iterator over the windows, row of blocks by row of blocks; it is called
            several times.
        config: as `trained.scoring_config` returns it.

    Returns:
        width, height, mpp (micrometres per pixel of level 0), level (that was read), grid (rows,
        columns, side and stride in pixels of level 0), windows (that were decided or failed),
        failed, tissue_share (of the grid's windows), positives, score (the mean of the
        config.slides.top greatest probabilities; None without any), largest_lesion_um,
        lesion_class (both None if all windows failed), regions, detections. For more than two
        classes positives, score, lesions and detections are None, and counts has the number of
        windows that are called each class.

    Raises:
        UserError: the slide can no longer be opened.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes, threshold = class_names(config), config.eval.threshold
    is_binary = len(classes) == 2
    write_tiles(folder / "tiles.csv.gz", grid, windows(), classes)
    # Gather the map twice, because drawing takes as much memory as the map, and more time.
    layer = layer_of(gather(slide, grid, windows(), threshold), is_binary)
    write_heatmap(folder / "heatmap.png", slide, layer, threshold, classes)
    found = gather(slide, grid, windows(), threshold)
    write_mask(folder / "mask.png", found)
    write_probability(folder / "probability.tif", found, windows, classes)
    regions = find_regions(found)
    write_regions(folder / "regions.geojson.gz", regions, classes)
    facts = _facts(found) | {"regions": len(regions.classes)}
    if is_binary:
        return facts | _lesions(folder, found, regions.diameters, config)
    # One of an earlier run may be there.
    (folder / _DETECTIONS).unlink(missing_ok=True)
    counts = np.bincount(found.called[found.tissue], minlength=len(classes)).tolist()
    unknown = ("positives", "score", "largest_lesion_um", "lesion_class", "detections")
    return facts | dict.fromkeys(unknown) | {"counts": dict(zip(classes, counts, strict=True))}


def _facts(found: WindowMap) -> dict[str, Any]:
    grid, tissue, failed = found.grid, int(found.tissue.sum()), int(found.failed.sum())
    return {
        "width": found.size[0],
        "height": found.size[1],
        "mpp": found.mpp,
        "level": grid.level,
        "grid": {
            "rows": grid.rows,
            "columns": grid.columns,
            "side": grid.side,
            "stride": math.sqrt(math.prod(found.pitch)),
        },
        "tissue_share": tissue / found.called.size,
        "windows": tissue + failed,
        "failed": failed,
    }


def _lesions(
    folder: Path, found: WindowMap, diameters: np.ndarray, config: ConfigDict
) -> dict[str, Any]:
    """Writes detections.csv, and returns the facts that only two classes have."""
    slides, largest = config.slides, float(diameters.max(initial=0))
    count = write_detections(
        folder / _DETECTIONS, found, slides.detection_threshold, slides.detection_radius
    )
    # "none" would call a slide normal of which nothing could be read.
    is_unknown = found.failed.any() and not found.tissue.any()
    return {
        "positives": int((found.called == 1).sum()),
        "score": _score(found.probability[found.tissue], slides.top),
        "largest_lesion_um": None if is_unknown else largest,
        "lesion_class": None if is_unknown else lesion_class(largest),
        "detections": count,
    }


def _score(probabilities: np.ndarray, top: int) -> float | None:
    """Returns the mean of the `top` greatest probabilities, or of all; changes their order."""
    if not len(probabilities):
        return None
    top = min(top, len(probabilities))
    probabilities.partition(-top)
    return float(probabilities[-top:].mean())
