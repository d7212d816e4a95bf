"""Heat maps: probabilities drawn over the picture that they belong to."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bef_jax.data import pictures
from bef_jax.data.patch import PCAM_CLASSES
from bef_jax.errors import printable
from bef_jax.runtime import files
from bef_jax.scoring.class_names import drawn_name, drawn_names, file_name, positive_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_LONGEST = 1600  # pixels to which a larger picture is reduced: more than a drawing shows
# Longest side of a small picture in pixels, each of which is drawn as one. A drawing of it takes a
# third of the memory of one of 1,600.
SMALL = 1000
_INCHES = 10  # length of a drawing's longer side
_DPI = SMALL // _INCHES
_ALPHA = 0.6  # opacity of a map over its picture
_STRIP = 10  # a strip is more than this many times as long as it is wide
_BAND = 1 << 22  # pixels that are reduced at a time
_MOST_MAPPED = 64  # classes, with a map each
# Paul Tol's "muted" colours, which the colour-blind can tell apart, and grey for further classes.
_COLOURS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933",
            "#AA4499")  # fmt: skip
_OTHERS = "#888888"
_LINE = "#D55E00"  # around what is called positive
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
        found = np.full(_reduced_shape(height, width, scale), np.nan, np.float32)
        for y, x, probability in self.squares:
            area = found[_area(y, x, self.side, scale)]
            np.fmax(area, probability, out=area)
        return found


@dataclass
class ClassTiles:
    """The probabilities of one picture's tiles, for more than two classes.

    Attributes:
        side: of the square that a tile decides, in pixels.
        squares: (y, x) of each tile, as `TileProbabilities.add` takes them.
        called: the class with the largest probability, and that probability.
        rows: float32 [K], all probabilities. They are not kept of more than 64 classes, because a
            picture has up to a hundred thousand tiles.
    """

    side: int
    squares: list[tuple[int, int]] = field(default_factory=list)
    called: list[tuple[int, float]] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, y: int, x: int, probabilities: np.ndarray) -> None:
        """Adds the tile whose deciding square has its upper left corner at (y, x)."""
        self.squares.append((y, x))
        number = int(probabilities.argmax())
        self.called.append((number, float(probabilities[number])))
        if len(probabilities) <= _MOST_MAPPED:
            self.rows.append(probabilities.astype(np.float32))

    def of_class(self, number: int) -> TileProbabilities:
        """Returns the probabilities of one class."""
        found = TileProbabilities(self.side)
        for (y, x), row in zip(self.squares, self.rows, strict=True):
            found.add(y, x, float(row[number]))
        return found

    def called_classes(self, height: int, width: int, scale: int) -> np.ndarray:
        """Returns the class of each pixel, int [H / scale, W / scale]; -1 where there is no square.

        Of several squares that touch a pixel, the one with the largest probability decides.
        """
        found = np.full(_reduced_shape(height, width, scale), -1)
        # Paint the most certain squares last, so that they stay on top.
        by_probability = sorted(
            zip(self.called, self.squares, strict=True), key=lambda each: each[0][1]
        )
        for (number, _), (y, x) in by_probability:
            found[_area(y, x, self.side, scale)] = number
        return found


def _reduced_shape(height: int, width: int, scale: int) -> tuple[int, int]:
    return -(-height // scale), -(-width // scale)


def _area(y: int, x: int, side: int, scale: int) -> tuple[slice, slice]:
    """Returns the rows and columns of a reduced picture that the square at (y, x) touches."""
    return tuple(slice(start // scale, -(-(start + side) // scale)) for start in (y, x))


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


def write_heatmap(
    file: Path,
    picture: Path,
    tiles: TileProbabilities,
    threshold: float,
    classes: Sequence[str] = PCAM_CLASSES,
) -> None:
    """Draws the probabilities of class 1 of two classes over the picture, as a PNG.

    The picture is on the left, and again on the right, under its map. An outline on the right
    shows where patches are called positive.
    """
    pixels = pictures.read(picture)
    scale = _scale_of(pixels)
    found = tiles.to_array(*pixels.shape[:2], scale)
    # Squares that lie apart are not outlined if all are positive.
    area = (np.nan_to_num(found) >= threshold) & (np.nanmin(found) < threshold)
    _save(_draw(_reduced(pixels, scale), found, area, picture.name, classes), file)


def write_class_maps(
    folder: Path, picture: Path, tiles: ClassTiles, classes: Sequence[str]
) -> list[str]:
    """Draws maps of more than two classes over the picture, as PNGs, and returns their names.

    classes.png has the picture on the left, and on the right the class of each place. Each class
    that some place has also has a map of its probability, with a line around those places; its name
    is of `class_names.file_name`. With more than 64 classes there is only classes.png.
    """
    pixels = pictures.read(picture)
    scale, shape = _scale_of(pixels), pixels.shape[:2]
    small = _reduced(pixels, scale)
    del pixels  # 300 MB of the largest picture
    called = tiles.called_classes(*shape, scale)
    _save(_draw_classes(small, called, picture.name, classes), folder / "classes.png")
    written = ["classes.png"]
    for number in sorted({number for number, _ in tiles.called} if tiles.rows else ()):
        found = tiles.of_class(number).to_array(*shape, scale)
        name = f"{file_name(number, classes)}.png"
        figure = _draw_class(small, found, called == number, classes[number])
        _save(figure, folder / name)
        written.append(name)
    return written


def write_map(
    file: Path,
    pixels: np.ndarray,
    found: np.ndarray,
    name: str,
    threshold: float,
    classes: Sequence[str],
) -> None:
    """Draws probabilities of class 1 over a small picture, as `write_heatmap` does.

    Args:
        pixels: uint8 [H, W, 3].
        found: float [H, W]; NaN where there is no probability, but not everywhere.
        name: of the picture.
    """
    _save(_draw(pixels, found, found >= threshold, name, classes), file, _DPI)


def write_called(
    file: Path, pixels: np.ndarray, called: np.ndarray, name: str, classes: Sequence[str]
) -> None:
    """Draws the class of each place over a small picture, as classes.png shows it.

    Args:
        pixels: uint8 [H, W, 3].
        called: int [H, W]; -1 where there is no class, but not everywhere.
        name: of the picture.
    """
    _save(_draw_classes(pixels, called, name, classes), file, _DPI)


def write_plain(file: Path, pixels: np.ndarray, name: str, why: str) -> None:
    """Draws a small picture, uint8 [H, W, 3], that has no map; its title says why."""
    figure, (plain,) = _panels(pixels, 1)
    _set_title(plain, f"{name}: {why}")
    _save(figure, file, _DPI)


def class_colours(classes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Returns the colour of each class, RGB in 0 .. 255, in which maps of few classes show it."""
    from matplotlib.colors import to_rgb

    # Of two classes, the second one has the colour of the line around it.
    colours = (_OTHERS, _LINE) if len(classes) == 2 else _COLOURS
    rgb = [tuple(round(255 * value) for value in to_rgb(colour)) for colour in colours]
    return [rgb[number % len(rgb)] for number in range(len(classes))]


def _scale_of(pixels: np.ndarray) -> int:
    """Returns how many pixels of a picture become one pixel of its drawing."""
    return max(1, -(-max(pixels.shape[:2]) // _LONGEST))


def _save(figure: "Figure", file: Path, dpi: int = 150) -> None:
    """Writes a map, as `remove_heatmaps` recognises it, and makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as stream:
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": _MARK})
    # A figure refers to itself, so its pictures would stay until the next collection of garbage.
    figure.clear()


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


def _draw(
    pixels: np.ndarray, found: np.ndarray, area: np.ndarray, name: str, classes: Sequence[str]
) -> "Figure":
    """Draws probabilities over a picture, with a line around an area, bool [H, W]."""
    figure, (plain, covered) = _panels(pixels, 2)
    layer = _cover(covered, found)
    # A strip that is one pixel wide when drawn can have no outline.
    if area.any() and not area.all() and min(found.shape) > 1:
        _outline(covered, area)
    _set_title(plain, name)
    covered.set_title(f"largest probability {np.nanmax(found):.3f}", loc="left")
    bar = figure.colorbar(layer, ax=covered, shrink=0.8)
    # The font may lack the letters of a name.
    positive = drawn_name(positive_name(classes)) or "class 1"
    bar.set_label(f"probability of {positive}", parse_math=False)
    return figure


def _draw_classes(
    pixels: np.ndarray, called: np.ndarray, name: str, classes: Sequence[str]
) -> "Figure":
    """Draws the class of each place over a picture, and what share of the places each class has."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    figure, (plain, covered) = _panels(pixels, 2, beside=4.5)
    # The most frequent classes have a colour each, and the others are grey. So that pictures can be
    # compared, a class has the same colour in all of them, if there is a colour for each class.
    shares = np.bincount(called[called >= 0], minlength=len(classes)) / np.sum(called >= 0)
    frequent = np.argsort(-shares, kind="stable")[: len(_COLOURS)]
    places = range(len(classes)) if len(classes) <= len(_COLOURS) else frequent
    colours = dict(zip(map(int, places), _COLOURS, strict=False))
    rgba = np.zeros((*called.shape, 4))
    for number in np.flatnonzero(shares):
        rgba[called == number] = to_rgba(colours.get(int(number), _OTHERS), _ALPHA)
    covered.imshow(rgba, aspect=covered.get_aspect())
    names = drawn_names(classes)
    shown = [int(number) for number in frequent if shares[number]]
    labels = [f"{shares[number]:.1%} {names[number]}" for number in shown]
    handles = [Patch(color=colours[number], alpha=_ALPHA) for number in shown]
    if (left := 1 - shares[frequent].sum()) > 1e-9:
        labels.append(f"{left:.1%} others")
        handles.append(Patch(color=_OTHERS, alpha=_ALPHA))
    legend = figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=15)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _set_title(plain, name)
    covered.set_title("class with the largest probability", loc="left")
    return figure


def _draw_class(pixels: np.ndarray, found: np.ndarray, area: np.ndarray, name: str) -> "Figure":
    figure, (covered,) = _panels(pixels, 1)
    layer = _cover(covered, found)
    if not area.all() and min(area.shape) > 1:
        _outline(covered, area)
    _set_title(covered, drawn_name(name) or "?")
    bar = figure.colorbar(layer, ax=covered, shrink=0.8)
    bar.set_label(f"probability; the largest is {np.nanmax(found):.3f}")
    return figure


def _panels(pixels: np.ndarray, count: int, beside: float = 1.2) -> tuple["Figure", list["Axes"]]:
    """Returns a figure that shows a picture, uint8 [H, W, 3], `count` times side by side.

    Args:
        beside: inches that are left for something at the right.
    """
    from matplotlib.figure import Figure  # slow to import, and few inputs need it

    # Stretch a strip, because it would be a line if it were drawn to scale.
    shape = pixels.shape[:2]
    is_strip = max(shape) > _STRIP * min(shape)
    sides = [max(side / max(shape), 1 / _STRIP) * _INCHES for side in shape]  # inches
    figure = Figure((count * sides[1] + beside, sides[0] + 0.6), layout="constrained")
    drawn = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in drawn:
        axes.imshow(pixels, interpolation="nearest", aspect="auto" if is_strip else "equal")
        axes.set_axis_off()
    return figure, drawn


def _cover(axes: "Axes", found: np.ndarray) -> "AxesImage":
    """Draws probabilities, [H, W], over a picture; where they are NaN, the picture stays."""
    # Cividis also works for colour-blind readers, and is dark where the probability is low.
    return axes.imshow(
        found, cmap="cividis", vmin=0, vmax=1, alpha=_ALPHA, aspect=axes.get_aspect()
    )


def _outline(axes: "Axes", area: np.ndarray) -> None:
    """Draws a line around an area, bool [H, W], which must be two pixels wide and high."""
    axes.contour(area, levels=[0.5], colors=_LINE)


def _set_title(axes: "Axes", name: str) -> None:
    """Writes the name of a file or of a class over a picture."""
    # A name is not a formula, and may hold bytes that are not text.
    axes.set_title(printable(name), loc="left", parse_math=False)
