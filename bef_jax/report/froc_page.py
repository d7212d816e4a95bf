"""The page of --mode=froc: how well lesions and slides with tumour were found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bef_jax.errors import printable
from bef_jax.report.html import data_uri, figure, picture, table
from bef_jax.report.theme import DARK, LIGHT, Theme, legend, plot, png
from bef_jax.runtime.files import write_bytes, write_text

# Ehteshami Bejnordi et al., JAMA 2017: the best entry, and a pathologist who took 30 hours.
_BEST_ENTRY, _PATHOLOGIST = 0.807, 0.724
_LEAST = 1 / 16  # false positives per slide where the plot begins, because its axis is logarithmic
_MOST_ROWS = 2000  # of lesions on the page; lesions.csv has all
_UNFOLDED = 40  # rows of a table that is not folded
_ALT = "Sensitivity for lesions against the average number of false positives per slide"


@dataclass(frozen=True)
class FrocContent:
    """The content of the page.

    Attributes:
        title: of the run.
        summary: of --mode=froc.
        points: float64 [P, 2], average number of false positives and sensitivity, ascending.
        band: float64 [R, 3], false positives, and the ends of the 95% interval there, or NaN.
        lesions: the rows of lesions.csv.
        failed: names of slides that are left out.
    """

    title: str
    summary: Mapping[str, Any]
    points: np.ndarray
    band: np.ndarray
    lesions: Sequence[Mapping[str, Any]]
    failed: tuple[str, ...] = ()


def write_froc_page(folder: Path, content: FrocContent) -> Path:
    """Writes froc.png and index.html into a folder that exists, and returns the page's path."""
    light, dark = (png(draw_froc(content, theme)) for theme in (LIGHT, DARK))
    write_bytes(folder / "froc.png", light)
    page = folder / "index.html"
    write_text(page, _render(content, data_uri(light), data_uri(dark)))
    return page


# ---- the plot -----------------------------------------------------------------------------------


def draw_froc(content: FrocContent, theme: Theme) -> Figure:
    """Plots the curve with its band, and marks the rates that the score averages."""
    names = "false positives per slide, on average", "share of lesions found"
    drawn, axes = plot(theme, "FROC", *names)
    sensitivity = content.summary["sensitivity"]
    rates = [float(rate) for rate in sensitivity]
    axes.set_xscale("log", base=2)
    axes.set(xlim=(_LEAST, rates[-1] * 1.1), ylim=(-0.01, 1.01))
    axes.set_xticks(rates, list(sensitivity))
    axes.minorticks_off()
    if content.summary["froc"] is None:
        # An empty line makes the legend say why there is no curve.
        axes.plot([], [], color=theme.colour("test"), label=content.summary["reasons"]["froc"])
    else:
        _draw_curve(axes, content, theme, rates)
    legend(axes, theme, loc="lower right" if _is_high(sensitivity) else "upper left")
    return drawn


def _draw_curve(axes: Axes, content: FrocContent, theme: Theme, rates: list[float]) -> None:
    colour, summary = theme.colour("valid"), content.summary
    rate, low, high = content.band.T
    axes.fill_between(rate, low, high, color=colour, alpha=0.2, linewidth=0)
    label = f"score {summary['froc']:.3f}"
    if summary["froc_ci95"]:
        label += "\n(95% CI {:.3f} to {:.3f})".format(*summary["froc_ci95"])
    false, found = content.points.T
    # Between points the score is linear in false positives, which a logarithmic axis bends.
    places = np.unique(np.concatenate([false, rate, np.geomspace(_LEAST, 9, 200)]))
    axes.plot(places, np.interp(places, false, found), color=colour, linewidth=2, label=label)
    axes.plot(rates, list(summary["sensitivity"].values()), "o", color=colour, markersize=6)


def _is_high(sensitivity: Mapping[str, float | None]) -> bool:
    return (next(iter(sensitivity.values())) or 0) > 0.4


# ---- the page -----------------------------------------------------------------------------------


def _render(content: FrocContent, light: str, dark: str) -> str:
    files = resources.files("bef_jax.report")
    template = Template(files.joinpath("froc_page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(printable(content.title)),
        style=files.joinpath("page.css").read_text(encoding="utf-8"),
        headline=_headline(content.summary),
        reasons=_reasons(content),
        plot=picture(_ALT, light, dark),
        sensitivities=_sensitivities(content.summary),
        anchors=_anchors(content.summary),
        confusion=_confusion(content.summary["confusion"]),
        lesions=_lesions(content.lesions),
    )


def _headline(summary: Mapping[str, Any]) -> str:
    counts = {
        "slides": "n_slides",
        "slides with tumour": "n_tumour_slides",
        "lesions": "n_lesions",
        "isolated tumour cells (ITC), which are not counted": "n_itc",
    }
    rows = [["", "this run"]]
    rows += [["FROC score", figure(summary, "froc", "{:.4f}")]]
    rows += [["AUC over slides", figure(summary, "slide_auc", "{:.4f}")]]
    return table(rows + [[name, f"{summary[key]:,}"] for name, key in counts.items()])


def _reasons(content: FrocContent) -> str:
    names = {"froc": "FROC score", "froc_ci95": "interval of the score", "slide_auc": "AUC"}
    lines = [
        f"There is no {names[key]}, because {escape(reason)}."
        for key, reason in content.summary["reasons"].items()
    ]
    if content.failed:
        some = escape(printable(", ".join(content.failed[:20])))
        lines.append(f"Slides that failed and are left out ({len(content.failed):,}): {some}.")
    return "".join(f"<p>{line}</p>\n" for line in lines)


def _sensitivities(summary: Mapping[str, Any]) -> str:
    rows = [["false positives per slide", "lesions found"]]
    for rate, value in summary["sensitivity"].items():
        rows.append([rate, "-" if value is None else f"{value:.1%}"])
    return table(rows)


def _anchors(summary: Mapping[str, Any]) -> str:
    score = "-" if summary["froc"] is None else f"{summary['froc']:.3f}"
    return table(
        [
            ["", "measured on", "figure"],
            ["this run, FROC score", "the slides of this page", score],
            ["best entry of CAMELYON16 (HMS and MIT), FROC score", "its 129 test slides",
             f"{_BEST_ENTRY}"],
            ["pathologist without limit of time, lesions found without a false positive",
             "the same 129 slides", f"{_PATHOLOGIST:.1%}"],
        ]
    )  # fmt: skip


def _confusion(confusion: Mapping[str, Mapping[str, int]] | None) -> str:
    if confusion is None:
        return "<p>The truth does not say which class of metastasis slides have.</p>"
    rows = [["", *(f"called {name}" for name in confusion)]]
    for name, counts in confusion.items():
        rows.append([name, *(f"{counts[found]:,}" for found in confusion)])
    return table(rows)


def _lesions(lesions: Sequence[Mapping[str, Any]]) -> str:
    head = ["slide", "lesion", "longest axis, um", "", "probability", "false positives per slide"]
    rows = [head, *map(_lesion, lesions[:_MOST_ROWS])]
    more = len(lesions) - _MOST_ROWS
    note = f"<p>lesions.csv has {more:,} more.</p>" if more > 0 else ""
    shown = table(rows) + note
    if len(rows) <= _UNFOLDED:
        return shown
    return f"<details><summary>{len(lesions):,} lesions</summary>{shown}</details>"


def _lesion(row: Mapping[str, Any]) -> list[str]:
    probability, false = row["probability"], row["false_positives"]
    return [
        printable(row["slide"]),
        str(row["lesion"]),
        f"{row['longest_axis_um']:,.0f}",
        "ITC" if row["itc"] else "",
        "not found" if probability is None else f"{probability:.4f}",
        "-" if false is None else f"{false:.3g}",
    ]
