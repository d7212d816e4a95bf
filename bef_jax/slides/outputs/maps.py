"""probability.tif and mask.png, with a pixel for each window, and heatmap.png over the slide."""

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from bef_jax.errors import printable
from bef_jax.runtime import files
from bef_jax.scoring import heatmap
from bef_jax.scoring.slide_scorer import Windows
from bef_jax.slides.outputs.thumbnail import read_thumbnail, thumbnail_size
from bef_jax.slides.outputs.window_map import WindowMap
from bef_jax.slides.reader import Slide

_TILE = 256  # pixels of a side of the TIFF's tiles; a level that fits into one is the last
_MOST_CHANNELS = 64  # classes that have a channel each
_CLASSIC = 3 << 30  # bytes of pixels above which the TIFF has offsets of 64 bits
_FAILED, _TISSUE = 127, 255  # in mask.png

Iterate = Callable[[], Iterator[Windows]]


def write_mask(file: Path, found: WindowMap) -> None:
    """Writes a PNG with a pixel for each window: 255 for tissue, 0 for glass, 127 for failed."""
    mask = np.where(found.tissue, _TISSUE, 0).astype(np.uint8)
    mask[found.failed] = _FAILED
    with files.replacing(file) as stream:
        Image.fromarray(mask).save(stream, format="PNG")


# ---- probability.tif ----------------------------------------------------------------------------


def write_probability(
    file: Path, found: WindowMap, windows: Iterate, classes: Sequence[str]
) -> None:
    """Writes an OME-TIFF, float32, with a pixel for each cell of the map, and smaller levels.

    It has the probability of class 1 of two classes. More classes have a channel each, or above 64
    there is one channel for the probability of the class that is called. NaN is where nothing was
    decided. A pixel of a smaller level is the greatest of the four that it stands for, so that a
    single window stays visible. OME's physical size is that of a cell, and its position is that of
    the first pixel's upper left corner, in micrometres.

    Args:
        windows: returns an iterator over the windows; it is called once for each channel of more
            than two classes, so that memory holds one channel and the smaller levels of all.
    """
    names, planes = _channels(found, windows, classes)
    shape = found.probability.shape
    smaller: list[list[np.ndarray]] = [[] for _ in range(_levels(shape))]
    is_big = len(names) * found.probability.size * 4 * 4 / 3 > _CLASSIC
    with (
        files.replacing(file) as stream,
        tifffile.TiffWriter(stream, ome=True, bigtiff=is_big) as out,
    ):
        size = (len(names), *shape) if len(names) > 1 else shape
        out.write(
            _first_tiles(planes, smaller),
            shape=size,
            subifds=len(smaller),
            metadata=_metadata(found, names),
            **_options(found, 1),
        )
        for number, level in enumerate(smaller, 1):
            size = (*size[:-2], *level[0].shape)
            tiles = (tile for plane in level for tile in _tiles(plane))
            options = _options(found, 1 << number)
            out.write(tiles, shape=size, subfiletype=1, metadata=None, **options)


def _channels(
    found: WindowMap, windows: Iterate, classes: Sequence[str]
) -> tuple[list[str], Iterable[np.ndarray]]:
    """Returns the names of the channels, and their probabilities, float32 [rows, columns] each."""
    if len(classes) == 2:
        return [_channel_name(classes[1])], [found.probability.astype(np.float32)]
    if len(classes) > _MOST_CHANNELS:
        return ["class that is called"], [found.probability.astype(np.float32)]
    planes = (_plane(windows(), found, number) for number in range(len(classes)))
    return list(map(_channel_name, classes)), planes


def _channel_name(name: str) -> str:
    """Returns a class's name without what has a meaning in XML."""
    # tifffile 2024.6 does not escape these characters in OME's attributes.
    return printable(name).translate(dict.fromkeys(map(ord, '<>&"'), "_"))


def _plane(windows: Iterable[Windows], found: WindowMap, number: int) -> np.ndarray:
    plane = np.full(found.probability.shape, np.nan, np.float32)
    for part in windows:
        plane[part.rows, part.columns] = part.probabilities[:, number]
    return plane


def _levels(shape: tuple[int, int]) -> int:
    """Returns how many smaller levels there are; the longest side of the last fits into a tile."""
    return max(0, (-(-max(shape) // _TILE) - 1).bit_length())


def _first_tiles(
    planes: Iterable[np.ndarray], smaller: list[list[np.ndarray]]
) -> Iterator[np.ndarray]:
    """Yields the tiles of the largest level, and adds its planes, reduced, to the other levels."""
    for plane in planes:
        # Before the tiles, because tifffile asks for no more after the last one.
        reduced = plane
        for level in smaller:
            reduced = _halved(reduced)
            level.append(reduced)
        yield from _tiles(plane)


def _halved(plane: np.ndarray) -> np.ndarray:
    """Returns the greatest of each 2 x 2 pixels, with both sides rounded up; NaN if all are."""
    for axis in (0, 1):
        plane = np.fmax.reduceat(plane, np.arange(0, plane.shape[axis], 2), axis=axis)
    return plane


def _tiles(plane: np.ndarray) -> Iterator[np.ndarray]:
    for y in range(0, plane.shape[0], _TILE):
        for x in range(0, plane.shape[1], _TILE):
            tile = np.full((_TILE, _TILE), np.nan, np.float32)
            part = plane[y : y + _TILE, x : x + _TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _options(found: WindowMap, factor: int) -> dict:
    """Returns how a level is written whose pixels are `factor` cells wide and high."""
    centimetres = [factor * length * found.mpp / 1e4 for length in found.pitch]
    return {
        "dtype": np.float32,
        "tile": (_TILE, _TILE),
        "compression": "zlib",
        "photometric": "minisblack",
        "resolution": tuple(1 / length for length in centimetres),
        "resolutionunit": "CENTIMETER",
        "software": False,
    }


def _metadata(found: WindowMap, names: Sequence[str]) -> dict:
    """Returns what OME's XML says of the image."""
    (width, height), (x, y) = (
        [length * found.mpp for length in lengths] for lengths in (found.pitch, found.origin)
    )
    count = len(names)
    content = hashlib.sha256(repr((names, width, height)).encode())
    content.update(found.probability)
    return {
        "axes": "CYX" if count > 1 else "YX",
        "Name": "probability",
        "Description": f"probability of {', '.join(names)}; NaN: not decided",
        "Channel": {"Name": list(names)},
        "PhysicalSizeX": width,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": height,
        "PhysicalSizeYUnit": "µm",
        "Plane": {
            "PositionX": [x] * count,
            "PositionXUnit": ["µm"] * count,
            "PositionY": [y] * count,
            "PositionYUnit": ["µm"] * count,
        },
        # Each file needs a number of its own, and tifffile would draw one at random.
        "UUID": str(uuid.UUID(content.hexdigest()[:32])),
        "Creator": "bef_jax",
    }


# ---- heatmap.png --------------------------------------------------------------------------------


def layer_of(found: WindowMap, is_binary: bool) -> np.ndarray | str:
    """Returns what is drawn over the slide, with a value for each pixel of its thumbnail.

    Returns:
        float32 [H, W], probabilities of class 1, NaN where nothing was decided; or of more than two
        classes int [H, W], the class, or -1. A text says why there is nothing to draw.
    """
    if not found.tissue.any():
        return "no window can be decoded" if found.failed.any() else "no tissue"
    starts = [
        _cells_of(*axis)
        for axis in zip(
            thumbnail_size(*found.size, heatmap.SMALL)[::-1],
            found.size[::-1],
            found.origin[::-1],
            found.pitch[::-1],
            found.called.shape,
            strict=True,
        )
    ]
    if is_binary:
        return _greatest(found.probability, np.fmax, starts).astype(np.float32)
    return _most_certain(found, starts)


def write_heatmap(
    file: Path, slide: Slide, layer: np.ndarray | str, threshold: float, classes: Sequence[str]
) -> None:
    """Draws a layer, of `layer_of`, over the slide; failed windows are left out."""
    pixels, name = read_thumbnail(slide, heatmap.SMALL), slide.path.name
    if isinstance(layer, str):
        heatmap.write_plain(file, pixels, name, layer)
    elif len(classes) == 2:
        heatmap.write_map(file, pixels, layer, name, threshold, classes)
    else:
        heatmap.write_called(file, pixels, layer, name, classes)


def _cells_of(count: int, length: int, origin: float, pitch: float, cells: int) -> np.ndarray:
    """Returns the cell in which each pixel begins, int [count], for one axis.

    Args:
        count: of pixels.
        length: of the slide; length, origin and pitch are in pixels of level 0.
        origin: where the first cell begins.
        pitch: length of a cell.
        cells: how many there are.
    """
    begins = np.arange(count) * (length / count)
    # A pixel that begins at a cell's border must not take the cell before it by rounding.
    return np.clip(np.floor((begins - origin) / pitch + 1e-9).astype(int), 0, cells - 1)


def _greatest(values: np.ndarray, largest: np.ufunc, starts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the greatest value of the cells that belong to each pixel, one cell at least."""
    for axis, first in enumerate(starts):
        values = largest.reduceat(values, first, axis=axis)
    return values


def _most_certain(found: WindowMap, starts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the class of each pixel, that of its most certain cell; -1 where there is none."""
    count = int(found.called.max()) + 1
    certain = (np.nan_to_num(found.probability) * (1 << 30)).astype(np.int64)
    # One number says both, so that the greatest number has the class as well.
    both = np.where(found.called < 0, -1, certain * count + found.called)
    both = _greatest(both, np.maximum, starts)
    return np.where(both < 0, -1, both % count)
