"""Colours, axes and legends of a report's plots.

Every plot is drawn for light and for dark screens.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SIZE = (5.4, 4.4)  # inches: two fit side by side on a desktop screen, and one fills a phone


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; lines have Okabe and Ito's, which the colour-blind can tell apart."""

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
# Okabe and Ito's lighter blue and orange, with about twice the contrast of LIGHT's on dark paper.
DARK = Theme(
    "#161b22", "#d8dee4", "#30363d", {"train": "#56B4E9", "valid": "#E69F00", "test": "#009E73"}
)


def new_figure(theme: Theme, size: tuple[float, float] = _SIZE) -> Figure:
    """Returns an empty figure; its size is in inches."""
    # Do not use pyplot, because it has global state and may need a display.
    return Figure(size, facecolor=theme.paper, layout="constrained")


def plot(theme: Theme, title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Returns a figure with one plot, whose axes have these names."""
    figure = new_figure(theme)
    axes = figure.subplots()
    style(axes, theme, title, x, y)
    return figure, axes


def style(axes: Axes, theme: Theme, title: str, x: str, y: str) -> None:
    """Gives a plot its title, the names of its axes, and the colours of the theme."""
    axes.set_facecolor(theme.paper)
    axes.set_title(title, color=theme.ink, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)
    axes.tick_params(colors=theme.ink, length=0, pad=6)
    axes.locator_params(axis="x", steps=[1, 2, 5, 10])  # ticks at half epochs, not at quarters
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def legend(axes: Axes, theme: Theme, **options: Any) -> None:
    """Adds a legend, unless no line has a label."""
    # matplotlib warns about a legend without entries.
    if axes.get_legend_handles_labels()[0]:
        drawn = axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9, **options)
        for text in drawn.get_texts():
            text.set_parse_math(False)  # a class may have a name with dollar signs


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file, in the colours of its theme."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=figure.get_facecolor())
    return buffer.getvalue()
