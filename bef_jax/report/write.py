"""Writes the report: one page with all that a reader needs to judge a run.

The page contains its pictures, works offline and runs no script, so that one file can be mailed.
The plots are also saved beside it as PNG files.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bef_jax.report import multiclass_plots, page, plots
from bef_jax.report.gallery import Explain, contact_sheet, show
from bef_jax.report.html import block_of, data_uri
from bef_jax.report.theme import DARK, LIGHT, Theme, png
from bef_jax.runtime.files import write_bytes, write_text
from bef_jax.scoring.metrics import Evaluation

_MOST_ROWS = 128  # pixels of a tile on the page, which shows about 100 of them


@dataclass(frozen=True)
class Content:
    """The content of a report.

    Attributes:
        history: the lines of metrics.jsonl; if a step has several lines, the last one counts.
        evaluations: the evaluation of each split.
        images: for each split, indexable uint8 [N, S, S, 3] in the order of the evaluation's ids;
            the gallery leaves out a split without images.
        summary: the run's summary; its blocks by split and its scalars are shown.
        tables: more tables by title, each a list of rows of name and value.
        explain: Grad-CAM (`gallery.Explain`); None leaves the heat maps out.
        center: side of the square that decides a patch's label; 0: there is none.
    """

    history: list[dict[str, Any]]
    evaluations: Mapping[str, Evaluation]
    images: Mapping[str, Any]
    summary: Mapping[str, Any]
    tables: Mapping[str, list[list[Any]]] = field(default_factory=dict)
    explain: Explain | None = None
    center: int = 0


def write_report(report_dir: Path, content: Content) -> Path:
    """Writes plots, most_wrong.png and index.html into `report_dir`, and returns the page's path.

    The folder is made if it is missing; its files are replaced one by one. There is no
    most_wrong.png if no patch is shown.
    """
    report_dir.mkdir(parents=True, exist_ok=True)
    pictures = {
        name: _save(report_dir / f"{name}.png", draw) for name, draw in _plots(content).items()
    }
    galleries = {
        split: show(evaluation, content.images[split], content.explain, content.center)
        for split, evaluation in content.evaluations.items()
        if split in content.images
    }
    shown = [each for gallery in galleries.values() for each in gallery]
    if shown:
        write_bytes(report_dir / "most_wrong.png", _png(contact_sheet(shown)))
    # base64 makes pictures a third larger, which is the cost of one file that can be mailed.
    tiles = {
        split: [(each, data_uri(_png(_shrunk(each.pixels)))) for each in gallery]
        for split, gallery in galleries.items()
    }
    text = page.render(
        title=report_dir.resolve().parent.name,
        evaluations=content.evaluations,
        summary=content.summary,
        pictures=pictures,
        tiles=tiles,
        has_heat_maps=content.explain is not None,
        square_share=(content.center / len(shown[0].pixels)) ** 2 if shown else 0.0,
        tables=content.tables,
    )
    # Write the page last, so that a reload shows the old page, or all of the new one.
    write_text(report_dir / "index.html", text)
    return report_dir / "index.html"


def _plots(content: Content) -> dict[str, Callable[[Theme], Any]]:
    # These are functions, because each plot is drawn twice, in the colours of both themes.
    history = content.history
    evaluations = {
        split: _with_interval(evaluation, block_of(content.summary, split))
        for split, evaluation in content.evaluations.items()
    }
    curves = {
        "loss": lambda theme: plots.loss(history, theme),
        "validation": lambda theme: plots.validation(history, theme),
    }
    if page.has_many_classes(evaluations):
        return curves | _plots_of_many_classes(evaluations)
    return curves | {
        "roc": lambda theme: plots.roc(evaluations, theme),
        "precision_recall": lambda theme: plots.precision_recall(evaluations, theme),
        "reliability": lambda theme: plots.reliability(evaluations, theme),
    }


def _with_interval(evaluation: Evaluation, block: Mapping[str, Any]) -> Evaluation:
    """Returns the evaluation with the interval of its AUC; where there are groups, it has none."""
    interval = evaluation.metrics["auc_ci95"] or block.get("auc_ci95")
    return dataclasses.replace(evaluation, metrics=evaluation.metrics | {"auc_ci95": interval})


def _plots_of_many_classes(
    evaluations: Mapping[str, Evaluation],
) -> dict[str, Callable[[Theme], Any]]:
    drawn = {"reliability": functools.partial(multiclass_plots.reliability, evaluations)}
    for split, evaluation in evaluations.items():
        drawn[f"roc_{split}"] = functools.partial(multiclass_plots.roc, evaluation)
        drawn[f"confusion_{split}"] = functools.partial(multiclass_plots.confusion, evaluation)
    return drawn


def _save(path: Path, draw: Callable[[Theme], Any]) -> tuple[str, str]:
    """Writes the light picture to `path`, and returns both as data: addresses."""
    light, dark = (png(draw(theme)) for theme in (LIGHT, DARK))
    write_bytes(path, light)
    return data_uri(light), data_uri(dark)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # optimize, because the page contains every tile, and its size matters more than this time.
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    """Returns a tile with at most 128 rows, because the page shows it no larger."""
    height, width = pixels.shape[:2]
    if height <= _MOST_ROWS:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width * _MOST_ROWS // height, _MOST_ROWS)))
