"""What a run leaves for people: learning curves, ROC, the most wrong patches, and one page.

The page carries its pictures inside itself, so that the one file can be mailed; the pictures also
lie beside it as PNG. It is drawn twice, for light and for dark screens.
"""

import base64
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.metrics import roc_curve

from bef_jax.metrics import Evaluation

WORST = 12  # patches shown of each kind of mistake
COLUMNS = 6  # patches in a row of the gallery
CENTRE = 32  # side of the region that decides the label, in pixels


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; the lines have Okabe and Ito's, which the colour-blind tell apart."""

    paper: str
    ink: str
    grid: str
    splits: Mapping[str, str]

    def colour(self, split: str) -> str:
        """Returns the colour of a split's lines."""
        return self.splits.get(split, "#CC79A7")


LIGHT = Theme(
    "#ffffff", "#24292f", "#d8dee4", {"train": "#0072B2", "valid": "#D55E00", "test": "#009E73"}
)
DARK = Theme(
    "#161b22", "#d8dee4", "#30363d", {"train": "#56B4E9", "valid": "#E69F00", "test": "#009E73"}
)


def write_report(
    report_dir: Path,
    history: list[dict[str, Any]],
    evaluations: Mapping[str, Evaluation],
    images: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> Path:
    """Writes curves.png, roc.png, most_wrong.png and index.html into `report_dir`.

    Args:
        report_dir: made when it is missing; what it holds is replaced file by file.
        history: the lines of metrics.jsonl; of several lines of one step the last counts.
        evaluations: by split.
        images: by split, indexable uint8 [N, 96, 96, 3] in the order of the evaluation's ids; a
            split without images is left out of the gallery.
        summary: of the run; its scalars are listed.

    Returns:
        The path of index.html.
    """
    report_dir.mkdir(parents=True, exist_ok=True)
    mistakes = {split: _mistakes(evaluations[split]) for split in evaluations if split in images}
    draw = {
        "curves": lambda theme: _curves(history, theme),
        "roc": lambda theme: _roc(evaluations, theme),
    }
    if mistakes:
        draw["most_wrong"] = lambda theme: _gallery(evaluations, images, mistakes, theme)
    pictures = {name: _save(report_dir / f"{name}.png", draw[name]) for name in draw}
    wrong = {"picture": pictures.pop("most_wrong", ""), "ids": _id_table(evaluations, mistakes)}
    page = Template(_PAGE).substitute(
        pictures,
        title=escape(report_dir.resolve().parent.name),
        headline=_headline(evaluations),
        wrong=Template(_WRONG).substitute(wrong) if mistakes else "",
        facts=_facts(summary),
    )
    _write(report_dir / "index.html", page.encode())
    return report_dir / "index.html"


def _save(path: Path, draw: Callable[[Theme], Figure]) -> str:
    """Writes the light picture to `path`, and returns the element that embeds both."""
    light, dark = (_png(draw(theme)) for theme in (LIGHT, DARK))
    _write(path, light)
    uri_light, uri_dark = (
        f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{uri_dark}">'
        f'<img alt="{path.stem.replace("_", " ")}" src="{uri_light}"></picture>'
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=figure.get_facecolor())
    return buffer.getvalue()


# --- pictures ------------------------------------------------------------------------------------


def _figure(theme: Theme, width: float, height: float) -> Figure:
    # A Figure of its own, not pyplot's: no global state, no display.
    return Figure((width, height), facecolor=theme.paper, layout="constrained")


def _style(axes: Axes, theme: Theme, title: str, x: str, y: str) -> None:
    axes.set_facecolor(theme.paper)
    axes.set_title(title, color=theme.ink, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)
    axes.tick_params(colors=theme.ink, length=0, pad=6)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _legend(axes: Axes, theme: Theme, **kwargs: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9, **kwargs)


def _curves(history: list[dict[str, Any]], theme: Theme) -> Figure:
    figure = _figure(theme, 10, 3.8)
    loss, quality = figure.subplots(1, 2)
    _style(loss, theme, "Loss", "epoch", "cross-entropy, nats")
    _style(quality, theme, "Validation", "epoch", "")
    epoch, train = _series(history, "loss")
    loss.plot(epoch, train, color=theme.colour("train"), linewidth=0.8, alpha=0.4)
    loss.plot(epoch, _smoothed(train), color=theme.colour("train"), linewidth=2, label="train")
    mark = {"color": theme.colour("valid"), "marker": "o", "markersize": 4, "linewidth": 2}
    loss.plot(*_series(history, "valid_loss"), **mark, label="valid")
    quality.plot(*_series(history, "valid_auc"), **mark, label="AUC")
    mark |= {"color": theme.ink, "marker": "s", "linestyle": "--", "linewidth": 1.4}
    quality.plot(*_series(history, "valid_accuracy"), **mark, label="accuracy")
    _legend(loss, theme)
    _legend(quality, theme, loc="lower right")
    return figure


def _series(history: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the lines that have `key`, a value that is None as NaN (a gap)."""
    # A resumed run logs again the steps after its checkpoint: the last line of a step counts.
    lines = {line["step"]: line for line in history if key in line}
    points = [(lines[step]["epoch"], lines[step][key]) for step in sorted(lines)]
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    return epochs, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each point that is a fortieth of the curve, shorter at the ends."""
    half = len(values) // 80
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _roc(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    figure = _figure(theme, 10, 4.6)
    whole, corner = figure.subplots(1, 2)
    x, y = "1 - specificity (false positive rate)", "sensitivity (true positive rate)"
    _style(whole, theme, "Receiver operating characteristic", x, y)
    _style(corner, theme, "Its upper left corner", x, y)
    for axes in (whole, corner):
        axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
        for evaluation in evaluations.values():
            _roc_line(axes, evaluation, theme)
        axes.set_aspect("equal")
    whole.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    corner.set(xlim=(-0.003, 0.3), ylim=(0.7, 1.003))
    _legend(whole, theme, loc="lower right")
    return figure


def _roc_line(axes: Axes, evaluation: Evaluation, theme: Theme) -> None:
    figures, colour = evaluation.metrics, theme.colour(evaluation.split)
    if figures["auc"] is None:
        axes.plot([], [], color=colour, label=f"{evaluation.split}: one class only, no curve")
        return
    label = f"{evaluation.split}: AUC {figures['auc']:.4f}"
    if figures["auc_ci95"]:
        label += " (95% CI {:.4f} to {:.4f})".format(*figures["auc_ci95"])
    false_positive, true_positive, _ = roc_curve(evaluation.labels, evaluation.probabilities)
    axes.plot(false_positive, true_positive, color=colour, linewidth=2, label=label)
    # Where the threshold of the headline table lies.
    axes.plot(1 - figures["specificity"], figures["sensitivity"], "o", color=colour, markersize=7)


def _mistakes(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Indices of the most wrong patches by kind of mistake, the worst first."""
    probabilities = np.asarray(evaluation.probabilities)
    called = probabilities >= evaluation.metrics["threshold"]
    positive = np.asarray(evaluation.labels) == 1
    return {
        "false positives": _top(np.flatnonzero(called & ~positive), probabilities),
        "false negatives": _top(np.flatnonzero(~called & positive), -probabilities),
    }


def _top(indices: np.ndarray, badness: np.ndarray) -> np.ndarray:
    return indices[np.argsort(-badness[indices], kind="stable")[:WORST]]


def _gallery(
    evaluations: Mapping[str, Evaluation],
    images: Mapping[str, Any],
    mistakes: Mapping[str, Mapping[str, np.ndarray]],
    theme: Theme,
) -> Figure:
    blocks = [(split, kind, found) for split in mistakes for kind, found in mistakes[split].items()]
    rows = [-(-len(found) // COLUMNS) for _, _, found in blocks]
    heights = [0.4 + 1.95 * count for count in rows]
    figure = _figure(theme, 1.62 * COLUMNS, sum(heights))
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, count, (split, kind, found) in zip(parts, rows, blocks, strict=True):
        part.set_facecolor(theme.paper)
        title = f"{split}, {kind}" if count else f"{split}, {kind}: none"
        part.suptitle(title, x=0.01, ha="left", color=theme.ink, fontsize=11, fontweight="bold")
        for axes in part.subplots(count, COLUMNS, squeeze=False).flat if count else ():
            axes.set_axis_off()
        for axes, index in zip(part.axes, found, strict=False):
            _tile(axes, images[split][int(index)], evaluations[split], index, theme)
    return figure


def _tile(axes: Axes, image: np.ndarray, seen: Evaluation, index: int, theme: Theme) -> None:
    side = image.shape[0]
    axes.imshow(image, interpolation="nearest")
    corner = (side - CENTRE) / 2 - 0.5
    # A dark line under a light one shows on any tissue.
    for colour, width in (("black", 2.4), ("white", 1.0)):
        axes.add_patch(
            Rectangle((corner, corner), CENTRE, CENTRE, fill=False, color=colour, linewidth=width)
        )
    name = str(seen.ids[index])
    name = name if len(name) <= 20 else f"{name[:8]}...{name[-8:]}"
    axes.set_title(
        f"p = {seen.probabilities[index]:.3f}\n{name}", color=theme.ink, fontsize=8, pad=3
    )


# --- the page ------------------------------------------------------------------------------------

_COLUMNS = {
    "n": ("patches", "{:,}"),
    "auc": ("AUC", "{:.4f}"),
    "auc_ci95": ("95% CI", "{0[0]:.4f} to {0[1]:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "sensitivity": ("sensitivity", "{:.2%}"),
    "specificity": ("specificity", "{:.2%}"),
    "f1": ("F1", "{:.4f}"),
    "loss": ("loss", "{:.4f}"),
    "brier": ("Brier", "{:.4f}"),
    "ece": ("ECE", "{:.4f}"),
    "threshold": ("threshold", "{:g}"),
}


def _headline(evaluations: Mapping[str, Evaluation]) -> str:
    rows = [["split", *(name for name, _ in _COLUMNS.values())]]
    for split, evaluation in evaluations.items():
        figures = evaluation.metrics
        cells = [
            "-" if figures[key] is None else form.format(figures[key])
            for key, (_, form) in _COLUMNS.items()
        ]
        rows.append([split, *cells])
    return _table(rows)


def _facts(summary: Mapping[str, Any]) -> str:
    scalars = {k: v for k, v in summary.items() if isinstance(v, str | int | float)}
    rows = [[_fact_name(key), _fact(key, value)] for key, value in scalars.items()]
    return _table([["", "this run"], *rows])


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


def _id_table(
    evaluations: Mapping[str, Evaluation], mistakes: Mapping[str, Mapping[str, np.ndarray]]
) -> str:
    rows = [["split", "mistake", "id", "probability"]]
    for split, kinds in mistakes.items():
        seen = evaluations[split]
        for kind, found in kinds.items():
            rows += [[split, kind, seen.ids[i], f"{seen.probabilities[i]:.6f}"] for i in found]
    return _table(rows)


def _table(rows: list[list[Any]]) -> str:
    """A table whose first row is the head; every cell is escaped."""
    head, *body = (
        "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)
        for row, tag in zip(rows, ["th"] + ["td"] * (len(rows) - 1), strict=True)
    )
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<div><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


_WRONG = """<section><h2>The most wrong patches</h2>
<p>p is the probability of a metastasis; the square is the region that decides the label.</p>
$picture
<details><summary>Their ids</summary>$ids</details></section>
"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: report</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --desk: #f6f8fa; --ink: #24292f; --soft: #57606a;
  --line: #d8dee4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161b22; --desk: #0d1117; --ink: #d8dee4; --soft: #9aa4af; --line: #30363d } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 64rem; background: var(--desk);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0 0 1.5rem; font-size: 1.6rem }
h2 { margin: 0 0 .75rem; font-size: 1.1rem }
section { margin: 0 0 1.25rem; padding: 1.25rem; background: var(--paper);
  border: 1px solid var(--line); border-radius: 10px }
p { margin: 0 0 .75rem; color: var(--soft) }
img { display: block; width: 100%; height: auto }
div { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 }
tr:last-child td { border-bottom: 0 }
summary { cursor: pointer; color: var(--soft) }
</style>
<h1>$title</h1>
<section><h2>Headline</h2>$headline</section>
<section><h2>Learning curves</h2>$curves</section>
<section><h2>ROC</h2><p>The dots are the table's threshold.</p>$roc</section>
$wrong
<section><h2>Run</h2>$facts</section>
</html>
"""
