"""Writes small slides: tiled pyramids, Aperio's files, flat TIFF files, and damaged ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

GLASS = (243, 242, 244)  # no saturation to speak of
Mpp = float | tuple[float, float] | None


def tissue_pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Returns smooth, coloured, random pixels, uint8 [height, width, 3]; JPEG keeps them well."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 24 + 2, width // 24 + 2, 3))
    small = (small * (0.4, 0.5, 0.4) + (130, 40, 120)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def level_sizes(
    width: int, height: int, downsamples: Sequence[float | tuple[int, int]]
) -> list[tuple[int, int]]:
    """Returns the widths and heights of levels; a pair among the downsamples is a size itself."""
    return [
        each if isinstance(each, tuple) else (max(1, int(width / each)), max(1, int(height / each)))
        for each in downsamples
    ]


def write_pyramid(
    path: Path,
    pixels: np.ndarray,
    mpp: Mpp = None,
    downsamples: Sequence[float | tuple[int, int]] = (1, 2, 4),
    tile: int = 256,
    compression: str = "jpeg",
    aperio: bool = False,
) -> Path:
    """Writes a tiled pyramid that OpenSlide opens; returns its path.

    Args:
        pixels: uint8 [H, W, 3], or [H, W, 4] with alpha (deflate).
        mpp: micrometres per pixel of level 0, one for both axes, or for x and y.
        downsamples: of the levels; a pair is the width and height of a level.
        compression: jpeg or deflate.
        aperio: as an Aperio scanner writes it: the scale stands in the description.
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    with tifffile.TiffWriter(path) as tif:
        for number, size in enumerate(level_sizes(width, height, downsamples)):
            level = image if size == image.size else image.resize(size, Image.Resampling.BOX)
            tif.write(
                np.asarray(level),
                tile=(tile, tile),
                **_tags(mpp, width / size[0], number, compression, aperio, (width, height)),
                **({"extrasamples": ["unassalpha"]} if pixels.shape[2] == 4 else {}),
                **({"compressionargs": {"level": 90}} if compression == "jpeg" else {}),
            )
    return path


def _tags(
    mpp: Mpp, factor: float, number: int, compression: str, aperio: bool, size: tuple[int, int]
) -> dict:
    tags = {
        "photometric": "rgb",
        "compression": compression,
        "subfiletype": 0 if aperio or not number else 1,
        "metadata": None,
        "software": False,
    }
    if aperio:
        scale = f"|MPP = {mpp}" if mpp else ""
        tags["description"] = f"Aperio Image Library v11.2.1\r\n{size[0]}x{size[1]} JPEG/RGB{scale}"
    elif mpp:
        tags |= _resolution(mpp, factor)
    return tags


def _resolution(mpp: Mpp, factor: float) -> dict:
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    resolution = (10_000 / x / factor, 10_000 / y / factor)
    return {"resolution": resolution, "resolutionunit": "CENTIMETER"}


def write_flat(
    path: Path,
    pixels: np.ndarray,
    mpp: Mpp = None,
    rows: int = 16,
    compression: str | None = "deflate",
    **options: object,
) -> Path:
    """Writes a TIFF of one level in strips of so many rows, which OpenSlide refuses.

    Args:
        pixels: uint8 [H, W], [H, W, 3] or [H, W, 4].
        options: of tifffile.imwrite, such as photometric or colormap.
    """
    tags = {"photometric": "minisblack" if pixels.ndim == 2 else "rgb"} | options
    scale = _resolution(mpp, 1) if mpp else {}
    tifffile.imwrite(
        path, pixels, rowsperstrip=rows, compression=compression, metadata=None, **tags, **scale
    )
    return path


def write_sparse(
    path: Path,
    side: int = 80_000,
    mpp: Mpp = 0.25,
    tissue: tuple[float, float, float, float] = (0.25, 0.25, 0.55, 0.55),
    downsamples: Sequence[int] = (1, 4, 16, 64),
    tile: int = 512,
    glass: np.ndarray | None = None,
) -> Path:
    """Writes a large JPEG pyramid whose tiles are all the same but in a box; takes seconds.

    Each level repeats the same two tiles, so levels do not show the same place.

    Args:
        side: of level 0 in pixels, both ways.
        tissue: x0, y0, x1, y1 of the box with tissue, as shares of the slide.
        glass: uint8 [tile, tile, 3], what is repeated outside of the box.
    """
    if glass is None:
        glass = np.full((tile, tile, 3), GLASS, np.uint8)
    encoded = [_jpeg(glass), _jpeg(tissue_pixels(tile, tile))]
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for number, factor in enumerate(downsamples):
            length = side // factor
            tif.write(
                _repeated(encoded, tissue, -(-length // tile)),
                shape=(length, length, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                **_tags(mpp, factor, number, "jpeg", False, (side, side)),
            )
    return path


def _jpeg(pixels: np.ndarray) -> bytes:
    # The same colours and subsampling that tifffile writes into its tags.
    return imagecodecs.jpeg8_encode(
        pixels, level=90, colorspace="rgb", outcolorspace="ycbcr", subsampling=(2, 2)
    )


def _repeated(
    encoded: list[bytes], box: tuple[float, float, float, float], count: int
) -> Iterator[bytes]:
    x0, y0, x1, y1 = box
    for row in range(count):
        for column in range(count):
            x, y = (column + 0.5) / count, (row + 0.5) / count
            yield encoded[x0 <= x < x1 and y0 <= y < y1]


def break_tile(path: Path, level: int, row: int, column: int, filling: bytes = b"\0") -> Path:
    """Overwrites the bytes of one tile of a level, which can no longer be decoded.

    Args:
        row: of tiles, from 0.
        column: the same.
        filling: the byte that is written.
    """
    with tifffile.TiffFile(path) as tif:
        page = [page for page in tif.pages if page.is_tiled][level]
        index = row * -(-page.imagewidth // page.tilewidth) + column
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(filling * count)
    return path


def set_tag(path: Path, name: str, index: int, value: int) -> Path:
    """Overwrites one of the values of a tag of the first page, each of 4 bytes."""
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags[name]
        if tag.dtype != tifffile.DATATYPE.LONG:
            raise TypeError(f"{name} has other values")
    with open(path, "r+b") as file:
        file.seek(tag.valueoffset + 4 * index)
        file.write(value.to_bytes(4, "little"))
    return path
