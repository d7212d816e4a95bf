"""Heat maps: probabilities drawn over the picture that they belong to."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bef_jax.data import pictures
from bef_jax.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 1600  # pixels to which a larger picture is reduced: more than a drawing shows
_INCHES = 10  # length of a drawing's longer side
_STRIP = 10  # a strip is more than this many times as long as it is wide
_BAND = 1 << 22  # pixels that are reduced at a time
_MARK = "bef_jax heat map"  # in each PNG, so that `remove_heatmaps` recognises it


@dataclass
class TileProbabilities:
    """The probabilities of one picture's tiles.

    Attributes:
        side: of the square that a tile decides, in pixels.
        squares: (y, x, probability) of each tile.
    """

    side: int
    squares: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, y: int, x: int, probability: float) -> None:
        """Adds the tile whose deciding square has its upper left corner at (y, x)."""
        self.squares.append((y, x, probability))

    def to_array(self, height: int, width: int, scale: int) -> np.ndarray:
        """Returns probabilities [H / scale, W / scale], float32, with both sides rounded up.

        Each pixel has the largest probability of the squares that touch it. A pixel that no square
        touches is NaN, which happens at strides above the side of a square.
        """
        found = np.full((-(-height // scale), -(-width // scale)), np.nan, np.float32)
        for y, x, probability in self.squares:
            top, left = y // scale, x // scale
            bottom, right = -(-(y + self.side) // scale), -(-(x + self.side) // scale)
            area = found[top:bottom, left:right]
            np.fmax(area, probability, out=area)
        return found


def name_of(picture: str) -> str:
    """Returns the name of a picture's map, a PNG.

    Args:
        picture: its path below the input, so that equal names in two folders stay apart.
    """
    path = PurePosixPath(picture)
    if path.suffix == ".png":
        return picture
    # Keep the suffix, because a.tif and a.jpg have a map each. A long name loses it, because the
    # name of a file has 255 bytes at most.
    is_long = len(os.fsencode(path.name)) > 251
    return str(path.with_suffix(".png")) if is_long else f"{picture}.png"


def write_heatmap(file: Path, picture: Path, tiles: TileProbabilities, threshold: float) -> None:
    """Draws the probabilities over the picture, as a PNG.

    The picture is on the left, and again on the right, under its map. An outline on the right
    shows where patches are called positive.
    """
    pixels = pictures.read(picture)
    scale = max(1, -(-max(pixels.shape[:2]) // _LONGEST))
    found = tiles.to_array(*pixels.shape[:2], scale)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = _draw(_reduced(pixels, scale), found, picture.name, threshold)
    figure.savefig(file, format="png", dpi=150, metadata={"Software": _MARK})


def remove_heatmaps(folder: Path) -> None:
    """Removes the maps that were written into `folder`, and all folders in it that are then empty.

    Other files stay, because the folder may be a user's own that has the same name.
    """
    for file in folder.rglob("*.png"):
        if file.is_file() and not file.is_symlink() and _is_ours(file):
            file.unlink()
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            below.rmdir()


def _is_ours(file: Path) -> bool:
    with open(file, "rb") as stream:
        # The text in a PNG stands before its pixels, so the first bytes are enough.
        return _MARK.encode() in stream.read(1024)


def _reduced(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Returns means of `scale` x `scale` squares, uint8 [H / scale, W / scale, 3], rounded up."""
    # Work in bands, because Pillow's image of a large picture takes more memory than the array.
    rows = max(1, _BAND // (scale * pixels.shape[1])) * scale
    bands = (pixels[top : top + rows] for top in range(0, len(pixels), rows))
    return np.concatenate([Image.fromarray(np.ascontiguousarray(x)).reduce(scale) for x in bands])


def _draw(pixels: np.ndarray, found: np.ndarray, name: str, threshold: float) -> "Figure":
    from matplotlib.figure import Figure  # slow to import, and few inputs need it

    height, width = found.shape
    # Stretch a strip, because it would be a line if it were drawn to scale.
    is_strip = max(height, width) > _STRIP * min(height, width)
    sides = [max(side / max(height, width), 1 / _STRIP) * _INCHES for side in found.shape]  # inches
    figure = Figure((2 * sides[1] + 1.2, sides[0] + 0.6), layout="constrained")
    plain, covered = figure.subplots(1, 2)
    for axes in (plain, covered):
        axes.imshow(pixels, interpolation="nearest", aspect="auto" if is_strip else "equal")
        axes.set_axis_off()
    # Cividis also works for colour-blind readers, and is dark where the probability is low.
    layer = covered.imshow(
        found, cmap="cividis", vmin=0, vmax=1, alpha=0.6, aspect=covered.get_aspect()
    )
    # A strip that is one pixel wide when drawn can have no outline.
    if np.nanmax(found) >= threshold > np.nanmin(found) and min(found.shape) > 1:
        covered.contour(np.nan_to_num(found) >= threshold, levels=[0.5], colors="#D55E00")
    # The name of a file is not a formula, and may hold bytes that are not text.
    plain.set_title(printable(name), loc="left", parse_math=False)
    covered.set_title(f"largest probability {np.nanmax(found):.3f}", loc="left")
    figure.colorbar(layer, ax=covered, label="probability of a metastasis", shrink=0.8)
    return figure
