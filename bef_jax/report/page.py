"""The page of a report: HTML from tables, plots and tiles. All text that it shows is escaped."""

from collections.abc import Mapping
from datetime import timedelta
from html import escape
from importlib import resources
from string import Template
from types import ModuleType
from typing import Any

import numpy as np

from bef_jax.report import many_classes, two_classes
from bef_jax.report.gallery import ShownPatch
from bef_jax.report.html import Columns, block_of, figure, picture, section, table
from bef_jax.scoring.metrics import Evaluation

_ALT = {
    "loss": "Training and validation loss over epochs",
    "validation": "AUC and accuracy on the validation split over epochs",
}
_OVER_PATCHES = (
    "The brackets hold 95% intervals over patches. Patches of one slide are alike, so figures vary "
    "more\nbetween slides."
)
_OVER_GROUPS = (
    "The brackets hold 95% intervals over groups, such as patients, because patches of one group "
    "are alike."
)
_SQUARE_NOTE = (
    ", and the square is the region that\ndecides the label. The square has {:.0%} of the area"
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
    parts = many_classes if has_many_classes(evaluations) else two_classes
    # This is not safe_substitute, because a place that nothing fills must be an error.
    return template.substitute(
        title=escape(title),
        style=files.joinpath("page.css").read_text(encoding="utf-8") + parts.STYLE,
        intervals=_interval_note(evaluations, summary),
        headline=_headline(evaluations, summary, parts.COLUMNS),
        **{name: picture(_ALT[name], *pictures[name]) for name in _ALT},
        judged=parts.judged(evaluations, summary, pictures),
        p=parts.gallery_note(evaluations),
        square=_SQUARE_NOTE.format(square_share) if square_share else "",
        heat_maps=_HEAT_MAP_NOTE if has_heat_maps else "",
        galleries="".join(
            _gallery(split, shown, parts, evaluations) for split, shown in tiles.items() if shown
        ),
        tables="".join(section(name, rows) for name, rows in tables.items()),
        facts=_facts(summary),
    )


def has_many_classes(evaluations: Mapping[str, Evaluation]) -> bool:
    """Returns whether the evaluations are of more than two classes."""
    return any(each.probabilities.ndim == 2 for each in evaluations.values())


def _interval_note(evaluations: Mapping[str, Evaluation], summary: Mapping[str, Any]) -> str:
    is_grouped = any(each.groups is not None for each in evaluations.values())
    blocks = {split: block_of(summary, split).get("ci95") or {} for split in evaluations}
    missing = [
        f" Intervals of {escape(split)} are missing, because {escape(block['reason'])}."
        for split, block in blocks.items()
        if "reason" in block
    ]
    return (_OVER_GROUPS if is_grouped else _OVER_PATCHES) + "".join(missing)


def _headline(
    evaluations: Mapping[str, Evaluation], summary: Mapping[str, Any], columns: Columns
) -> str:
    """Returns a table with a row per figure and a column per split, to fit a narrow screen."""
    # Add the summary's block, because it has the intervals.
    blocks = {
        split: evaluation.metrics | block_of(summary, split)
        for split, evaluation in evaluations.items()
    }
    rows = [["", *blocks]]
    for key, (name, number_format) in columns.items():
        rows.append([name, *(figure(block, key, number_format) for block in blocks.values())])
    return table(rows)


# ---- the run ------------------------------------------------------------------------------------


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


# ---- the gallery --------------------------------------------------------------------------------


def _gallery(
    split: str,
    tiles: list[tuple[ShownPatch, str]],
    parts: ModuleType,
    evaluations: Mapping[str, Evaluation],
) -> str:
    groups = []
    for kind in dict.fromkeys(each.kind for each, _ in tiles):
        of_kind = [tile for tile in tiles if tile[0].kind == kind]
        groups.append(_group(parts.heading(kind, evaluations), kind, of_kind))
    return f"<h3>{escape(split)}</h3>{''.join(groups)}"


def _group(heading: str, kind: str, tiles: list[tuple[ShownPatch, str]]) -> str:
    shares = [each.in_centre for each, _ in tiles if each.in_centre is not None]
    mean = f"; {np.mean(shares):.0%} of the attribution in the square" if shares else ""
    figures = "".join(_tile_html(each, uri) for each, uri in tiles)
    # Show six digits: with three, as in the caption, confident patches may all be 1.000.
    names = ["class", "called"] if tiles[0][0].names else []
    rows = [["id", *names, "probability"]]
    rows += [[each.id, *(each.names or []), f"{each.probability:.6f}"] for each, _ in tiles]
    return (
        f"<h4>{heading} <small>{kind}{mean}</small></h4><div class=tiles>{figures}</div>"
        f"<details><summary>ids</summary>{table(rows)}</details>"
    )


def _tile_html(each: ShownPatch, uri: str) -> str:
    inside = "" if each.in_centre is None else f", {each.in_centre:.0%} in the square"
    caption = f"p = {each.probability:.3f}{inside}"
    if each.names:
        own, called = map(escape, each.names)
        caption = f"{own}, called {called}: {caption}" if each.is_wrong else f"{own}: {caption}"
    alt = escape(f"patch {each.id}", quote=True)
    return f'<figure><img alt="{alt}" src="{uri}"><figcaption>{caption}</figcaption></figure>'
