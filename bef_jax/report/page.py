"""The page of a report: HTML from tables, plots and tiles. All text that it shows is escaped."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from bef_jax.report.gallery import ShownPatch
from bef_jax.scoring.metrics import Evaluation

_COLUMNS = {
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
# Figures of _COLUMNS that a temperature or a threshold can change.
_TUNED = ("accuracy", "sensitivity", "specificity", "f1", "loss", "brier", "ece")
_ALT = {
    "loss": "Training and validation loss over epochs",
    "validation": "AUC and accuracy on the validation split over epochs",
    "roc": "Receiver operating characteristic of each split",
    "precision_recall": "Precision against recall of each split",
    "reliability": "Share of positives against predicted probability, and patches in each bin",
}
_KINDS = {
    "false positives": "Normal, called metastasis",
    "false negatives": "Metastasis, called normal",
    "true positives": "Metastasis, called metastasis",
    "true negatives": "Normal, called normal",
}
_TUNED_NOTE = (
    "<p>The temperature and the threshold were chosen on valid, so figures on valid are too good."
    "</p>\n"
)
_SQUARE_NOTE = (
    ", and the square is the region that decides the label. The square has {:.0%} of the area"
)
_HEAT_MAP_NOTE = (
    " The heat map (Grad-CAM) at the right of a patch is more yellow where the patch supports the "
    "decision more."
)


def render(
    title: str,
    evaluations: Mapping[str, Evaluation],
    summary: Mapping[str, Any],
    pictures: Mapping[str, tuple[str, str]],
    tiles: Mapping[str, list[tuple[ShownPatch, str]]],
    has_heat_maps: bool,
    square_share: float,
    tables: Mapping[str, list[list[Any]]],
) -> str:
    """Returns the page.

    Args:
        pictures: for each name, the data: addresses for light and for dark screens.
        tiles: for each split, what the gallery shows, each with its picture's address.
        has_heat_maps: whether the pictures of tiles have heat maps.
        square_share: share of a patch's area that decides its label; 0: no square is drawn.
        tables: for each title, rows of name and value.
    """
    files = resources.files("bef_jax.report")
    template = Template(files.joinpath("page.html").read_text(encoding="utf-8"))
    # This is not safe_substitute, because a place that nothing fills must be an error.
    return template.substitute(
        title=escape(title),
        style=files.joinpath("page.css").read_text(encoding="utf-8"),
        headline=_headline(evaluations, summary),
        tuned=_tuned(summary),
        confusion="".join(_confusion(evaluation) for evaluation in evaluations.values()),
        **{name: _picture(name, *both) for name, both in pictures.items()},
        square=_SQUARE_NOTE.format(square_share) if square_share else "",
        heat_maps=_HEAT_MAP_NOTE if has_heat_maps else "",
        galleries="".join(_gallery(split, shown) for split, shown in tiles.items() if shown),
        tables="".join(_section(name, rows) for name, rows in tables.items()),
        facts=_facts(summary),
    )


# ---- figures ------------------------------------------------------------------------------------


def _headline(evaluations: Mapping[str, Evaluation], summary: Mapping[str, Any]) -> str:
    """Returns a table with a row per figure and a column per split, to fit a narrow screen."""
    # Add the summary's block, because it has the intervals.
    blocks = {
        split: evaluation.metrics | _block(summary, split)
        for split, evaluation in evaluations.items()
    }
    rows = [["", *blocks]]
    for key, (name, number_format) in _COLUMNS.items():
        rows.append([name, *(_figure(block, key, number_format) for block in blocks.values())])
    return table(rows)


def _block(summary: Mapping[str, Any], split: str) -> dict[str, Any]:
    block = summary.get(split)
    return dict(block) if isinstance(block, Mapping) else {}


def _figure(block: Mapping[str, Any], key: str, number_format: str) -> str:
    value = block.get(key)
    if value is None:
        return "-"
    # The interval of the AUC has its own, stable key. The other intervals are all in ci95.
    interval = block.get(f"{key}_ci95") or (block.get("ci95") or {}).get(key)
    text = number_format.format(value)
    if interval:
        low, high = (number_format.format(end) for end in interval)
        text += f" ({low} to {high})"
    return text


def _tuned(summary: Mapping[str, Any]) -> str:
    """Returns a table of each split with a temperature and a threshold chosen on valid, or ""."""
    rows = [["split", "", "", *(_COLUMNS[key][0] for key in _TUNED)]]
    for split in ("valid", "test"):
        for name, chosen in (("calibrated", "temperature"), ("operating_point", "threshold")):
            block = _block(summary, split).get(name)
            if block and block[chosen] is not None:
                # A dash means that a block lacks a figure: a temperature changes no decision at
                # 0.5, and a threshold changes no probability.
                cells = [_figure(block, key, _COLUMNS[key][1]) for key in _TUNED]
                rows.append([split, chosen, f"{block[chosen]:.4g}", *cells])
    return _TUNED_NOTE + table(rows) if len(rows) > 1 else ""


def _confusion(evaluation: Evaluation) -> str:
    """Returns a table of the counts of one split, with their shares of the row."""
    called = np.asarray(evaluation.probabilities) >= evaluation.metrics["threshold"]
    rows = [[evaluation.split, "called normal", "called metastasis"]]
    for label, name in enumerate(("normal", "metastasis")):
        of_class = called[np.asarray(evaluation.labels) == label]
        counts = [int((of_class == decision).sum()) for decision in (False, True)]
        shares = [f" ({count / len(of_class):.1%})" if len(of_class) else "" for count in counts]
        cells = (f"{count:,}{share}" for count, share in zip(counts, shares, strict=True))
        rows.append([name, *cells])
    return table(rows)


def _facts(summary: Mapping[str, Any]) -> str:
    # The blocks of the splits have their own tables.
    scalars = {k: v for k, v in summary.items() if isinstance(v, str | int | float)}
    return table([["", "this run"], *([_fact_name(k), _fact(k, v)] for k, v in scalars.items())])


def _fact_name(key: str) -> str:
    return key.replace("_seconds", "_time").replace("_fraction", "_share").replace("_", " ")


def _fact(key: str, value: str | int | float) -> str:
    if key.endswith("_seconds"):
        return str(timedelta(seconds=round(value)))
    if key.endswith("_fraction"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


# ---- pieces -------------------------------------------------------------------------------------


def _picture(name: str, light: str, dark: str) -> str:
    # Only screens get the dark picture. Paper gets the light one, even if the system prefers dark.
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{_ALT[name]}" src="{light}"></picture>'
    )


def _gallery(split: str, tiles: list[tuple[ShownPatch, str]]) -> str:
    kinds = dict.fromkeys(each.kind for each, _ in tiles)
    parts = (_group(kind, [tile for tile in tiles if tile[0].kind == kind]) for kind in kinds)
    return f"<h3>{escape(split)}</h3>{''.join(parts)}"


def _group(kind: str, tiles: list[tuple[ShownPatch, str]]) -> str:
    shares = [each.in_centre for each, _ in tiles if each.in_centre is not None]
    mean = f"; {np.mean(shares):.0%} of the attribution in the square" if shares else ""
    figures = "".join(_tile_html(each, uri) for each, uri in tiles)
    # Show six digits: with three, as in the caption, confident patches may all be 1.000.
    rows = [["id", "probability"], *([each.id, f"{each.probability:.6f}"] for each, _ in tiles)]
    return (
        f"<h4>{_KINDS[kind]} <small>{kind}{mean}</small></h4><div class=tiles>{figures}</div>"
        f"<details><summary>ids</summary>{table(rows)}</details>"
    )


def _tile_html(each: ShownPatch, uri: str) -> str:
    inside = "" if each.in_centre is None else f", {each.in_centre:.0%} in the square"
    caption = f"p = {each.probability:.3f}{inside}"
    alt = escape(f"patch {each.id}", quote=True)
    return f'<figure><img alt="{alt}" src="{uri}"><figcaption>{caption}</figcaption></figure>'


def _section(title: str, rows: list[list[Any]]) -> str:
    content = table([["", ""], *rows])
    if len(rows) > 20:  # such as a whole configuration
        content = f"<details><summary>{len(rows)} entries</summary>{content}</details>"
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table(rows: Iterable[list[Any]]) -> str:
    """Returns a table whose first row is the head; every cell is escaped."""
    head, *body = rows
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in body)
    names = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    # The table has a box that scrolls, so that on a phone the whole page need not scroll sideways.
    return (
        f"<div class=scroll><table><thead><tr>{names}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )
