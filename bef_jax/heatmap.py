"""Probabilities drawn over the picture that they were found in."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bef_jax.data import pictures
from bef_jax.data.augment import CENTER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE = CENTER[1] - CENTER[0]  # pixels of the square that a probability is about
_LONGEST = 1600  # pixels of the drawing's longer side: what a screen shows
_INCHES = 10  # of the same


@dataclass
class Scores:
    """The probabilities of one picture's tiles."""

    squares: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, y: int, x: int, probability: float) -> None:
        """Adds the tile whose deciding square has its upper left corner at (y, x)."""
        self.squares.append((y, x, probability))

    def spread(self, height: int, width: int, scale: int) -> np.ndarray:
        """Probabilities [H / scale, W / scale], float32: of each pixel the largest about it.

        NaN where no square lies, which happens at strides above 32.
        """
        found = np.full((-(-height // scale), -(-width // scale)), np.nan, np.float32)
        for y, x, probability in self.squares:
            top, left = y // scale, x // scale
            bottom, right = -(-(y + _SIDE) // scale), -(-(x + _SIDE) // scale)
            area = found[top:bottom, left:right]
            np.fmax(area, probability, out=area)
        return found


def write_heatmap(file: Path, picture: Path, scores: Scores, threshold: float) -> Path:
    """Draws the probabilities over the picture, and returns the PNG's path.

    Left the picture, right the same under its map; where a patch is called positive is outlined.
    """
    pixels = pictures.read(picture)
    scale = max(1, -(-max(pixels.shape[:2]) // _LONGEST))
    found = scores.spread(*pixels.shape[:2], scale)
    size = (found.shape[1], found.shape[0])
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    _draw(small, found, picture.name, threshold).savefig(temporary, format="png", dpi=150)
    os.replace(temporary, file)
    return file


def _draw(pixels: np.ndarray, found: np.ndarray, name: str, threshold: float) -> "Figure":
    from matplotlib.figure import Figure  # here: it takes a while, and few inputs need it

    height, width = found.shape
    inches = _INCHES / max(height, width)
    figure = Figure((2 * width * inches + 1.2, height * inches + 0.6), layout="constrained")
    plain, covered = figure.subplots(1, 2)
    for axes in (plain, covered):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_axis_off()
    # Cividis: one hue for the colour-blind too, and dark where nothing was found.
    layer = covered.imshow(found, cmap="cividis", vmin=0, vmax=1, alpha=0.6)
    if np.nanmax(found) >= threshold > np.nanmin(found):
        covered.contour(np.nan_to_num(found) >= threshold, levels=[0.5], colors="#D55E00")
    # A file's name is no formula, and need not even be text.
    shown = name.encode(errors="replace").decode()
    plain.set_title(shown, loc="left", parse_math=False)
    covered.set_title(f"largest probability {np.nanmax(found):.3f}", loc="left")
    figure.colorbar(layer, ax=covered, label="probability of a metastasis", shrink=0.8)
    return figure
