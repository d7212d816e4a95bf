"""The figures and files of --mode=froc."""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bef_jax.errors import UserError, listed, printable
from bef_jax.report.froc_page import FrocContent, write_froc_page
from bef_jax.runtime.files import check_outputs, replacing
from bef_jax.scoring.intervals import interval_of
from bef_jax.scoring.metrics import binary_metrics
from bef_jax.scoring.probabilities_csv import csv_cell
from bef_jax.slides.annotations import LESION_CLASSES
from bef_jax.slides.froc.curve import RATES, Curve, Froc, score_of
from bef_jax.slides.froc.judge import Judged, judge
from bef_jax.slides.froc.scored import read_scored
from bef_jax.slides.froc.truth import read_truth

LOG = logging.getLogger(__name__)
_FOLDER = "froc"
_LESIONS, _CURVE, _PAGE, _PICTURE = "lesions.csv", "curve.csv", "index.html", "froc.png"
_FILES = (_LESIONS, _CURVE, _PAGE, _PICTURE)
_LESION_COLUMNS = (
    *("slide", "lesion", "x", "y", "longest_axis_um", "itc", "probability"),
    "false_positives",
)
_NO_LESIONS = "no slide has a lesion larger than isolated tumour cells"
_FEW_LESIONS = "more than 2.5 % of the resamples have no lesion"
_ONE_CLASS = "{} of {} slides have tumour; the AUC needs both kinds"
# Where the page draws the band, in false positives per slide.
_DRAWN = np.concatenate([[0.0], np.geomspace(1 / 16, 8, 113)])


def evaluate_slides(workdir: Path, truth_dir: Path | None) -> dict:
    """Compares the slides that a workdir has scores of with their truth; writes WORKDIR/froc/.

    Args:
        workdir: of a run of --mode=predict.
        truth_dir: has reference.csv, annotations, or both.

    Returns:
        The summary: mode, truth, froc (CAMELYON16's score), froc_ci95, sensitivity (by the average
        number of false positives per slide), slide_auc, slide_auc_ci95, n_slides, n_tumour_slides,
        n_failed, n_lesions (without ITC), n_itc, confusion (slides by true and by found class, or
        None), reasons (why a figure is None) and files.

    Raises:
        UserError: slides or truth cannot be read, or the outputs cannot be written.
    """
    if truth_dir is None:
        raise UserError("--truth is missing: name the folder of annotations and reference.csv")
    check_outputs(workdir, output_folders=[_FOLDER])
    check_outputs(workdir / _FOLDER, _FILES)
    slides, failed = read_scored(workdir)
    if failed:
        LOG.warning("slides that failed are left out (%d): %s", len(failed), listed(failed))
    judged = [
        judge(slide, truth)
        for slide, truth in zip(slides, read_truth(truth_dir, slides), strict=True)
    ]
    froc = Froc([each.hits for each in judged])
    curve, resampled = froc.curve(), froc.resampled([*RATES, *_DRAWN])
    summary = {
        "mode": "froc",
        "truth": str(truth_dir),
        **_figures_of_lesions(judged, curve, resampled[:, : len(RATES)]),
        **_figures_of_slides(judged, len(failed)),
    }
    summary["reasons"] = _reasons(summary)
    band = [interval_of(column) or (np.nan, np.nan) for column in resampled[:, len(RATES) :].T]
    points = np.stack([curve.false_positives, curve.sensitivity], axis=1)
    content = FrocContent(
        workdir.name,
        summary,
        points,
        np.column_stack([_DRAWN, band]),
        _lesion_rows(judged),
        tuple(failed),
    )
    return summary | {"files": _write(workdir / _FOLDER, content, curve)}


# ---- figures ------------------------------------------------------------------------------------


def _figures_of_lesions(judged: Sequence[Judged], curve: Curve, resampled: np.ndarray) -> dict:
    at_rates = curve.at(RATES)
    lesions = [lesion for each in judged for lesion in each.lesions]
    n_itc = sum(lesion["itc"] for lesion in lesions)
    return {
        "froc": _or_none(score_of(at_rates)),
        "froc_ci95": interval_of(score_of(resampled)),
        "sensitivity": {
            f"{rate:g}": _or_none(value) for rate, value in zip(RATES, at_rates, strict=True)
        },
        "n_lesions": len(lesions) - n_itc,
        "n_itc": n_itc,
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _figures_of_slides(judged: Sequence[Judged], failed: int) -> dict:
    labels = np.array([each.is_tumour for each in judged], int)
    metrics = binary_metrics(np.array([each.slide.score for each in judged]), labels)
    return {
        "slide_auc": metrics["auc"],
        "slide_auc_ci95": metrics["auc_ci95"],
        "n_slides": len(judged),
        "n_tumour_slides": int(labels.sum()),
        "n_failed": failed,
        "confusion": _confusion(judged),
    }


def _confusion(judged: Sequence[Judged]) -> dict[str, dict[str, int]] | None:
    """Returns the number of slides by their true and found class; None without true classes."""
    known = [(each.lesion_class, each.slide.lesion_class) for each in judged if each.lesion_class]
    if not known:
        return None
    return {
        true: {found: known.count((true, found)) for found in LESION_CLASSES}
        for true in LESION_CLASSES
    }


def _reasons(summary: dict) -> dict[str, str]:
    """Returns why figures are None."""
    reasons = {}
    if summary["froc"] is None:
        reasons["froc"] = _NO_LESIONS
    elif summary["froc_ci95"] is None:
        reasons["froc_ci95"] = _FEW_LESIONS
    if summary["slide_auc"] is None:
        reasons["slide_auc"] = _ONE_CLASS.format(summary["n_tumour_slides"], summary["n_slides"])
    return reasons


# ---- files --------------------------------------------------------------------------------------


def _write(folder: Path, content: FrocContent, curve: Curve) -> list[str]:
    """Writes all files, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lesions(folder / _LESIONS, content.lesions)
    _write_curve(folder / _CURVE, curve)
    write_froc_page(folder, content)
    return [str(folder / name) for name in _FILES]


def _lesion_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Returns the rows of all lesions, with the false positives per slide at their probability."""
    false = np.sort(np.concatenate([each.hits.false_positives for each in judged]))
    rows = []
    for lesion in (lesion for each in judged for lesion in each.lesions):
        probability, count = lesion["probability"], None
        if probability is not None:
            count = (len(false) - int(np.searchsorted(false, probability))) / len(judged)
        rows.append(lesion | {"false_positives": count})
    return rows


def _write_lesions(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(file, "w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(_LESION_COLUMNS)
        for row in rows:
            cells = {**row, "slide": csv_cell(printable(row["slide"])), "itc": int(row["itc"])}
            out.writerow([cells[column] for column in _LESION_COLUMNS])


def _write_curve(file: Path, curve: Curve) -> None:
    with replacing(file, "w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(["threshold", "false_positives", "sensitivity"])
        columns = (curve.thresholds, curve.false_positives, curve.sensitivity)
        for row in zip(*columns, strict=True):
            out.writerow([_or_none(value) for value in row])  # without lesions, no sensitivity
