"""The parts of a report's page that are only right for more than two classes."""

from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from bef_jax.report.gallery import MISTAKES
from bef_jax.report.html import Columns, block_of, figure, picture, table
from bef_jax.report.multiclass_plots import MOST_ROWS
from bef_jax.scoring.metrics import Evaluation

# A matrix keeps its size on a phone, and scrolls there, because its names could not be read.
STYLE = """\
.matrices { display: grid; gap: 1rem; margin: 0 0 .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 31rem), 1fr)) }
.matrices.wide { grid-template-columns: 1fr }
.matrices > div { overflow-x: auto }
.matrices img { display: block; width: 100%; min-width: 31rem }
.matrices.wide img { min-width: 56rem }
td { max-width: 18rem; overflow-wrap: break-word }
figcaption { overflow-wrap: anywhere }
@media print { .matrices img, .matrices.wide img { min-width: 0 } }
"""
COLUMNS: Columns = {
    "n": ("patches", "{:,}"),
    "auc": ("AUC, mean of the classes", "{:.4f}"),
    "balanced_accuracy": ("balanced accuracy", "{:.2%}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "macro_f1": ("F1, mean of the classes", "{:.4f}"),
    "loss": ("loss", "{:.4f}"),
    "brier": ("Brier", "{:.4f}"),
    "ece": ("ECE of the called class", "{:.4f}"),
}
_OF_CLASS: Columns = {
    "auc": ("AUC", "{:.4f}"),
    "sensitivity": ("sensitivity", "{:.2%}"),
    "specificity": ("specificity", "{:.2%}"),
}
_TUNED = ("loss", "brier", "ece")  # figures of COLUMNS that a temperature can change
_MOST_SIDE_BY_SIDE = 12  # classes, so that two matrices fit side by side
_MISTAKES_SHOWN = 10
_RELIABILITY = "Share that is right against the probability of the called class, and patches a bin"
_TUNED_NOTE = "<p>The temperature was chosen on valid, so figures on valid are too good.</p>\n"


def judged(
    evaluations: Mapping[str, Evaluation],
    summary: Mapping[str, Any],
    pictures: Mapping[str, tuple[str, str]],
) -> str:
    """Returns the sections about classes, ranking, decisions and probabilities."""
    template = resources.files("bef_jax.report").joinpath("many_classes.html")
    count = max(len(evaluation.classes) for evaluation in evaluations.values())
    is_part = count > MOST_ROWS
    return Template(template.read_text(encoding="utf-8")).substitute(
        shown=f" The {MOST_ROWS} of {count:,} classes with the lowest sensitivity are listed; the "
        "summary has all."
        if is_part
        else "",
        classes="".join(_classes(each, summary) for each in evaluations.values()),
        roc="".join(
            picture(f"ROC of each class against the rest on {split}", *pictures[f"roc_{split}"])
            for split in evaluations
        ),
        pooled=f" The {MOST_ROWS - 1} classes with the most mistakes have a row each; all others "
        "count as one class."
        if is_part
        else "",
        confusion=_confusion(evaluations, pictures, count),
        mistakes="".join(_mistakes(evaluation) for evaluation in evaluations.values()),
        reliability=picture(_RELIABILITY, *pictures["reliability"]),
        tuned=_tuned(summary),
    )


def gallery_note(_: Mapping[str, Evaluation]) -> str:
    """Returns what the gallery's p means."""
    return "p is the probability of the called class"


def heading(kind: str, _: Mapping[str, Evaluation]) -> str:
    """Returns the heading of a kind of patches in the gallery (`gallery.pick_of_many`)."""
    return "Called another class" if kind == MISTAKES else "Called their own class"


def _classes(evaluation: Evaluation, summary: Mapping[str, Any]) -> str:
    """Returns a table with the figures of each class, or of those with the lowest sensitivity."""
    figures = evaluation.metrics["per_class"]
    intervals = (block_of(summary, evaluation.split).get("ci95") or {}).get("per_class") or {}
    counts = np.bincount(evaluation.labels, minlength=len(evaluation.classes))
    numbers = range(len(counts))
    if len(numbers) > MOST_ROWS:
        sensitivity = [figures[name]["sensitivity"] for name in evaluation.classes]
        # NumPy turns None into NaN, and sorts NaN to the end.
        lowest = np.argsort(np.array(sensitivity, float), kind="stable")[:MOST_ROWS]
        numbers = sorted(lowest.tolist())
    rows = [["", evaluation.split, "patches", *(name for name, _ in _OF_CLASS.values())]]
    for number in numbers:
        name = evaluation.classes[number]
        block = figures[name] | {"ci95": intervals.get(name)}
        cells = (figure(block, key, form) for key, (_, form) in _OF_CLASS.items())
        rows.append([number, name, f"{counts[number]:,}", *cells])
    return table(rows)


def _confusion(
    evaluations: Mapping[str, Evaluation], pictures: Mapping[str, tuple[str, str]], count: int
) -> str:
    drawn = "".join(
        f"<div>{picture(f'Confusion matrix of {split}', *pictures[f'confusion_{split}'])}</div>"
        for split in evaluations
    )
    wide = " wide" if count > _MOST_SIDE_BY_SIDE else ""
    return f'<div class="matrices{wide}">{drawn}</div>'


def _mistakes(evaluation: Evaluation) -> str:
    """Returns a table of the most frequent pairs of a class and the class that it is called."""
    count, labels = len(evaluation.classes), evaluation.labels.astype(np.int64)
    called = evaluation.probabilities.argmax(axis=1)
    wrong = labels != called
    pairs, times = np.unique(labels[wrong] * count + called[wrong], return_counts=True)
    rows = [[f"mistakes on {evaluation.split}", "called", "patches", "of the class"]]
    for index in np.argsort(-times, kind="stable")[:_MISTAKES_SHOWN]:
        own, other = divmod(int(pairs[index]), count)
        share = times[index] / np.sum(labels == own)
        names = evaluation.classes[own], evaluation.classes[other]
        rows.append([*names, f"{times[index]:,}", f"{share:.1%}"])
    return table(rows) if len(rows) > 1 else ""


def _tuned(summary: Mapping[str, Any]) -> str:
    """Returns a table of each split with a temperature that was chosen on valid, or ""."""
    rows = [["split", "temperature", *(COLUMNS[key][0] for key in _TUNED)]]
    for split in ("valid", "test"):
        block = block_of(summary, split).get("calibrated")
        if block and block["temperature"] is not None:
            cells = (figure(block, key, COLUMNS[key][1]) for key in _TUNED)
            rows.append([split, f"{block['temperature']:.4g}", *cells])
    return _TUNED_NOTE + table(rows) if len(rows) > 1 else ""
