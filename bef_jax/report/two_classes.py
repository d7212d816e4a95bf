"""The parts of a report's page that are only right for two classes."""

from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from bef_jax.data.patch import PCAM_CLASSES
from bef_jax.report.html import Columns, block_of, figure, picture, table
from bef_jax.scoring.metrics import Evaluation

STYLE = ""
COLUMNS: Columns = {
    "n": ("patches", "{:,}"),
    "auc": ("AUC", "{:.4f}"),
    "average_precision": ("average precision", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "sensitivity": ("sensitivity", "{:.2%}"),
    "specificity": ("specificity", "{:.2%}"),
    "f1": ("F1", "{:.4f}"),
    "loss": ("loss", "{:.4f}"),
    "brier": ("Brier", "{:.4f}"),
    "ece": ("ECE", "{:.4f}"),
    "threshold": ("threshold", "{:g}"),
}
# Figures of COLUMNS that a temperature or a threshold can change.
_TUNED = ("accuracy", "sensitivity", "specificity", "f1", "loss", "brier", "ece")
_ALT = {
    "roc": "Receiver operating characteristic of each split",
    "precision_recall": "Precision against recall of each split",
    "reliability": "Share of positives against predicted probability, and patches in each bin",
}
_TUNED_NOTE = (
    "<p>The temperature and the threshold were chosen on valid, so figures on valid are too good."
    "</p>\n"
)


def names_of(evaluations: Mapping[str, Evaluation]) -> tuple[str, str]:
    """Returns the names of class 0 and class 1; those of PCam if there are no evaluations."""
    return next((tuple(each.classes) for each in evaluations.values()), PCAM_CLASSES)


def judged(
    evaluations: Mapping[str, Evaluation],
    summary: Mapping[str, Any],
    pictures: Mapping[str, tuple[str, str]],
) -> str:
    """Returns the sections about ranking, decisions and probabilities."""
    template = resources.files("bef_jax.report").joinpath("two_classes.html")
    names = names_of(evaluations)
    return Template(template.read_text(encoding="utf-8")).substitute(
        {name: picture(_ALT[name], *pictures[name]) for name in _ALT},
        confusion="".join(_confusion(evaluation, names) for evaluation in evaluations.values()),
        tuned=_tuned(summary),
    )


def gallery_note(evaluations: Mapping[str, Evaluation]) -> str:
    """Returns what the gallery's p means."""
    names = names_of(evaluations)
    positive = "a metastasis" if names == PCAM_CLASSES else escape(names[1])
    return f"p is the probability of {positive}"


def heading(kind: str, evaluations: Mapping[str, Evaluation]) -> str:
    """Returns the heading of a kind of patches in the gallery (`gallery.pick`)."""
    negative, positive = names_of(evaluations)
    called = positive if kind.endswith("positives") else negative
    own = positive if kind in ("false negatives", "true positives") else negative
    return escape(f"{own[:1].upper()}{own[1:]}, called {called}")


def _tuned(summary: Mapping[str, Any]) -> str:
    """Returns a table of each split with a temperature and a threshold chosen on valid, or ""."""
    rows = [["split", "", "", *(COLUMNS[key][0] for key in _TUNED)]]
    for split in ("valid", "test"):
        for name, chosen in (("calibrated", "temperature"), ("operating_point", "threshold")):
            block = block_of(summary, split).get(name)
            if block and block[chosen] is not None:
                # A dash means that a block lacks a figure: a temperature changes no decision at
                # 0.5, and a threshold changes no probability.
                cells = [figure(block, key, COLUMNS[key][1]) for key in _TUNED]
                rows.append([split, chosen, f"{block[chosen]:.4g}", *cells])
    return _TUNED_NOTE + table(rows) if len(rows) > 1 else ""


def _confusion(evaluation: Evaluation, names: tuple[str, str]) -> str:
    """Returns a table of the counts of one split, with their shares of the row."""
    called = np.asarray(evaluation.probabilities) >= evaluation.metrics["threshold"]
    rows = [[evaluation.split, *(f"called {name}" for name in names)]]
    for label, name in enumerate(names):
        of_class = called[np.asarray(evaluation.labels) == label]
        counts = [int((of_class == decision).sum()) for decision in (False, True)]
        shares = [f" ({count / len(of_class):.1%})" if len(of_class) else "" for count in counts]
        cells = (f"{count:,}{share}" for count, share in zip(counts, shares, strict=True))
        rows.append([name, *cells])
    return table(rows)
