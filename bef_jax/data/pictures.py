"""Pictures to be scored: a 96x96 patch as it is, a larger one in tiles."""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import Image

from bef_jax.data.augment import CENTER, PATCH
from bef_jax.errors import UserError

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")
LIMIT = 100_000_000  # pixels, 10,000 x 10,000: what decoding holds in memory, three bytes each
_MARGIN = CENTER[0]  # pixels of a tile around the square that decides
_SIDE = CENTER[1] - CENTER[0]
_WHITE = (255, 255, 255)


class Tile(NamedTuple):
    """A 96x96 window of a picture.

    Attributes:
        y: of the upper left corner of the window's deciding 32x32, in pixels of the picture.
        x: likewise.
        pixels: uint8 [96, 96, 3].
    """

    y: int
    x: int
    pixels: np.ndarray


def find(path: Path) -> list[Path]:
    """The pictures at `path`: itself, or all in a folder and the folders below it, sorted.

    Raises:
        UserError: there are none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if _is_shown(file.relative_to(path)))
    if not found:
        raise UserError(f"{path}: holds no picture ({', '.join(SUFFIXES)}); name another --input")
    return found


def _is_shown(name: Path) -> bool:
    """Of what is hidden, nothing is a picture: macOS keeps its notes in ._NAME.png."""
    hidden = any(part.startswith(".") for part in name.parts)
    return name.suffix.lower() in SUFFIXES and not hidden


def size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, by its header alone.

    Raises:
        UserError: it is no picture, of fewer than 96 pixels a side, or too large to be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size that is checked here
            with Image.open(path) as image:
                height, width = image.height, image.width
    # Above 179 million pixels Pillow itself refuses to open.
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: above {LIMIT:,} pixels; cut it into parts") from error
    except Exception:  # damaged, or a TIFF that Pillow does not know
        height, width = _size_by_tifffile(path)
    if min(height, width) < PATCH:
        raise UserError(f"{path}: {width}x{height} pixels; a patch has {PATCH}x{PATCH}")
    if height * width > LIMIT:
        raise UserError(f"{path}: {width}x{height} pixels are above {LIMIT:,}; cut it into parts")
    return height, width


def read(path: Path) -> np.ndarray:
    """The pixels of a picture, uint8 [H, W, 3]; what is transparent lies on white.

    Raises:
        UserError: it can't be decoded, or its pixels are not of 8 bits.
    """
    # First: decoding what is too large would already take the memory.
    size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path)
        with image:
            _check_depth(path, image.mode)
            return np.asarray(_on_white(image))
    except UserError:
        raise
    except Exception:  # damaged, or a compression that Pillow does not know
        pixels = _first_page(path, lambda page: page.asarray())
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"{path}: {pixels.dtype} {list(pixels.shape)}; convert it to RGB of 8 bits")
    return pixels


def tiles(pixels: np.ndarray, stride: int) -> Iterator[Tile]:
    """Cuts a picture into windows whose deciding squares lie `stride` pixels apart.

    The squares reach every edge: there windows look past the picture, at its mirror image. With a
    stride of 32 each pixel is decided on once, but for a last row and column that overlap.

    Args:
        pixels: uint8 [H, W, 3], H and W at least 96.
    """
    margins = [(_MARGIN, PATCH - CENTER[1])] * 2 + [(0, 0)]
    # One copy of the picture, of which each tile is a view.
    padded = np.pad(pixels, margins, mode="reflect")
    for y in positions(len(pixels), stride):
        for x in positions(pixels.shape[1], stride):
            yield Tile(y, x, padded[y : y + PATCH, x : x + PATCH])


def positions(length: int, stride: int) -> list[int]:
    """Where squares of 32 begin that cover `length` pixels, the last one flush with the end."""
    last = length - _SIDE
    return [min(i * stride, last) for i in range(math.ceil(last / stride) + 1)]


def _check_depth(path: Path, mode: str) -> None:
    # Pillow clips what has more than 8 bits, and says nothing.
    if mode.startswith(("I", "F")):
        raise UserError(f"{path}: pixels of more than 8 bits ({mode}); convert it to RGB of 8 bits")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    # Without its alpha, a pixel would show whatever colour lies below.
    canvas = Image.new("RGBA", image.size, _WHITE)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _size_by_tifffile(path: Path) -> tuple[int, int]:
    # Within `ask`: a damaged page may have no shape, or tuples for sides.
    return _first_page(path, lambda page: (int(page.shape[0]), int(page.shape[1])))


def _first_page(path: Path, ask: Callable[[tifffile.TiffPage], Any]) -> Any:
    """What `ask` says of the first page of a TIFF that Pillow could not read."""
    try:
        with tifffile.TiffFile(path) as tif:
            # Further pages are smaller levels of a pyramid, or thumbnails, as a rule.
            return ask(tif.pages[0])
    except Exception as error:  # a damaged file can raise almost anything there
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error
