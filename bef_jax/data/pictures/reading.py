"""Pictures to be scored: a patch is read as it is, a larger picture in tiles.

PNG, JPEG, TIFF, WebP and BMP with at most 8 bits per channel are read as every viewer shows them:
turned as their EXIF says, and laid on white where they are transparent. Everything else is refused.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from bef_jax.data.patch import Tiling, same_scale
from bef_jax.data.pictures import jpeg
from bef_jax.data.pictures.scale import mpp_of_tags
from bef_jax.data.pictures.silence import SILENCE
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file

T = TypeVar("T")

LIMIT = 100_000_000  # pixels, 10,000 x 10,000; decoding takes up to 7 bytes of memory for each
_WEBP_LIMIT = LIMIT // 4  # its decoder takes up to 20 bytes for each
_TOO_LARGE = f"above {LIMIT:,} pixels; cut it into parts"
# Pillow knows many more. For EPS it runs Ghostscript, which would run a stranger's program.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
_KINDS = "PNG, JPEG, TIFF, WebP or BMP"
_SMALL = 4 << 20  # bytes of a file that are read at once
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE = (255, 255, 255)
_BAND = 1 << 20  # pixels that are converted at once
# Tags of TIFF; EXIF has the first one too.
_ORIENTATION = 274
_BITS_PER_SAMPLE = 258
_X_RESOLUTION = 282
_RESOLUTION_UNIT = 296
_TILE_WIDTH = 322
_TILE_LENGTH = 323
_SAMPLE_FORMAT = 339
_UNSIGNED = 1  # a value of _SAMPLE_FORMAT
# By the value of _ORIENTATION, which says where the first row and column of the file belong.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


class Header(NamedTuple):
    """The facts that a picture's header gives before the picture is decoded.

    Attributes:
        height: in pixels; height and width may change places when the picture is turned upright.
        width: in pixels.
        mode: Pillow's name of its channels, such as RGB.
        mpp: micrometres per pixel, if it is a TIFF that gives them.
    """

    height: int
    width: int
    mode: str
    mpp: float | None


class Tile(NamedTuple):
    """A window of a picture, as large as a patch.

    Attributes:
        y: row of the upper left corner of the window's central square, which decides its label; in
            pixels of the picture.
        x: column of that corner.
        pixels: uint8 [S, S, 3].
    """

    y: int
    x: int
    pixels: np.ndarray


Check = Callable[[Path | str, Header], None]


def check_size(path: Path, header: Header) -> None:
    """Raises `UserError` for a picture that is too large to decode."""
    height, width = header.height, header.width
    if height * width > LIMIT:
        raise UserError(f"{path}: {width}x{height} pixels are {_TOO_LARGE}")


def fit_for(side: int, mpp: float | None = None) -> Check:
    """Returns a check like `check_size` that also refuses what a network cannot score.

    Args:
        side: of the network's patches, in pixels; no side of a picture may be smaller.
        mpp: micrometres per pixel of the network; a picture that says another scale is refused.
    """

    def check(path: Path, header: Header) -> None:
        height, width = header.height, header.width
        if min(height, width) < side:
            raise UserError(
                f"{path}: {width}x{height} pixels; the network reads patches of {side}x{side}, so "
                "give a picture that is not smaller"
            )
        if mpp and header.mpp and not same_scale(header.mpp, mpp):
            raise UserError(
                f"{path}: says {header.mpp:.4g} um per pixel, but the network's patches have "
                f"{mpp:.4g}; resample it"
            )
        check_size(path, header)

    return check


def look(path: Path | str, check: Check = check_size, content: bytes | None = None) -> Header:
    """Returns what a picture's header says.

    Args:
        path: of the picture's file; with `content`, it is only its name in errors.
        check: raises UserError if the picture must be refused.
        content: of the file, if it is not on disk.

    Raises:
        UserError: it is not a picture, its channels have more than 8 bits, or `check` refuses it.
    """

    def of_image(image: Image.Image) -> Header:
        return header_of(path, image)

    def of_page(page: tifffile.TiffPage) -> Header:
        return _page_header(path, page)

    with _opened(path, content) as file:
        header = _with_pillow_or_tifffile(path, file, of_image, of_page)
    check(path, header)
    return header


def read(path: Path | str, check: Check = check_size, content: bytes | None = None) -> np.ndarray:
    """Returns the pixels of a picture as viewers show it, uint8 [H, W, 3].

    Args:
        path: see `look`.
        check: see `look`.
        content: see `look`.

    Raises:
        UserError: as for `look`, or it cannot be decoded.
    """

    def of_image(image: Image.Image) -> np.ndarray:
        # Check first, because decoding a picture that is too large would already take the memory.
        check(path, header_of(path, image))
        return _pixels(image)

    def of_page(page: tifffile.TiffPage) -> np.ndarray:
        check(path, _page_header(path, page))
        tag = page.tags.get(_ORIENTATION)
        return turned(page.asarray(), tag.value if tag else 1)

    with _opened(path, content) as file:
        # Decoders seek and read often, so a small file is read at once.
        small = _small_content(file)
        if size := jpeg.plain_size(small):
            check(path, Header(*size, "RGB", None))
            if (pixels := jpeg.decode(small)) is not None:
                return pixels
        whole = io.BytesIO(small) if small else file
        return _with_pillow_or_tifffile(path, whole, of_image, of_page)


def tiles(pixels: np.ndarray, tiling: Tiling) -> Iterator[Tile]:
    """Cuts a picture into windows whose deciding squares lie `tiling.stride` pixels apart.

    The squares reach every edge. Windows there extend past the picture and show its mirror image.
    If the stride is the square's side, the squares cover each pixel once, except that the last row
    and column of squares may overlap the ones before.

    Args:
        pixels: uint8 [H, W, 3], H and W at least `tiling.side`.
    """
    height, width = pixels.shape[:2]
    for y in positions(height, tiling):
        rows = _mirrored(y, height, tiling)[:, None]
        for x in positions(width, tiling):
            yield Tile(y, x, pixels[rows, _mirrored(x, width, tiling)])


def positions(length: int, tiling: Tiling) -> list[int]:
    """Returns where squares start, `tiling.stride` apart; the last one ends at `length`."""
    last = length - tiling.center
    return [min(i * tiling.stride, last) for i in range(math.ceil(last / tiling.stride) + 1)]


def _mirrored(start: int, length: int, tiling: Tiling) -> np.ndarray:
    """Returns the rows, or columns, of the window around the square at `start`, [S]."""
    first = start - (tiling.side - tiling.center) // 2
    index = np.abs(np.arange(first, first + tiling.side))
    return np.where(index < length, index, 2 * (length - 1) - index)


# ---- headers ------------------------------------------------------------------------------------


def header_of(path: Path | str, image: Image.Image) -> Header:
    """Returns what an opened image says; it refuses more than 8 bits, and WebP and tiles too large.

    Raises:
        UserError: see above.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}
    _check_depth(path, image, tags)
    _check_area(path, tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_LENGTH, 1))
    if image.format == "WEBP" and image.height * image.width > _WEBP_LIMIT:
        raise UserError(f"{path}: a WebP above {_WEBP_LIMIT:,} pixels; write it as PNG")
    mpp = mpp_of_tags(tags.get(_X_RESOLUTION), tags.get(_RESOLUTION_UNIT))
    return Header(image.height, image.width, image.mode, mpp)


def _check_depth(path: Path, image: Image.Image, tags: dict) -> None:
    """Refuses pixels that Pillow would silently clip, or cut to their upper 8 bits."""
    bits = max(tags.get(_BITS_PER_SAMPLE, (1,)))
    if image.format == "PNG":
        start = image.fp.tell()
        image.fp.seek(24)  # in IHDR, which is always the first chunk
        bits = image.fp.read(1)[0]
        image.fp.seek(start)
    if (
        image.mode.startswith(("I", "F"))
        or bits > 8
        or set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))) - {_UNSIGNED}
    ):
        raise UserError(f"{path}: its pixels do not have 8 bits; convert it to RGB of 8 bits")


def _page_header(path: Path, page: tifffile.TiffPage) -> Header:
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise UserError(f"{path}: its compression, {page.compression}, is unknown; write it as PNG")
    is_jpeg = page.compression == tifffile.COMPRESSION.JPEG
    # tifffile decodes the YCbCr of a JPEG to RGB.
    becomes_rgb = is_jpeg and page.photometric == tifffile.PHOTOMETRIC.YCBCR
    if page.photometric != tifffile.PHOTOMETRIC.RGB and not becomes_rgb:
        raise UserError(f"{path}: its colours are not RGB; convert it to RGB of 8 bits")
    if page.dtype != np.uint8 or page.ndim != 3 or page.shape[2] != 3:
        raise UserError(f"{path}: {page.dtype} {list(page.shape)}; convert it to RGB of 8 bits")
    _check_area(path, page.tilewidth * page.tilelength)
    tags = [page.tags.get(name) for name in (_X_RESOLUTION, _RESOLUTION_UNIT)]
    resolution, unit = (tag.value if tag else None for tag in tags)
    mpp = mpp_of_tags(resolution and resolution[0] / max(resolution[1], 1), unit and int(unit))
    return Header(page.shape[0], page.shape[1], "RGB", mpp)


def _check_area(path: Path, pixels: int) -> None:
    """Refuses huge tiles: a TIFF's tile is decoded whole, and may be larger than the picture."""
    if pixels > LIMIT:
        raise UserError(f"{path}: its tiles are {_TOO_LARGE}")


# ---- decoding -----------------------------------------------------------------------------------


def _opened(path: Path | str, content: bytes | None) -> BinaryIO:
    if content is not None:
        return io.BytesIO(content)
    try:
        return open_user_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a picture ({reason_of(error)})") from error


def _small_content(file: BinaryIO) -> bytes:
    """Returns what an open file holds, or nothing if that is too much to keep in memory."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return file.read(size) if size <= _SMALL else b""


def _with_pillow_or_tifffile(
    path: Path | str,
    file: BinaryIO,
    of_image: Callable[[Image.Image], T],
    of_page: Callable[[tifffile.TiffPage], T],
) -> T:
    """Returns `of_image` of Pillow's image, or `of_page` of a TIFF that Pillow cannot read.

    Raises:
        UserError: neither can read it; the text has the reason of each library that tried.
    """
    try:
        with SILENCE, Image.open(file, formats=_FORMATS) as image:
            return of_image(image)
    except UserError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit is 179 million pixels
        raise UserError(f"{path}: it is {_TOO_LARGE}") from error
    except UnidentifiedImageError:
        reason = f"it is not a {_KINDS}"
    # Pillow's decoders raise errors of any kind for a damaged file.
    except Exception as error:
        reason = reason_of(error)
    with contextlib.suppress(OSError):
        file.seek(0)
        if file.read(4) in TIFF_STARTS:
            return _with_tifffile(path, file, of_page, reason)
    raise UserError(f"{path}: cannot be read as a picture ({reason})")


def _with_tifffile(
    path: Path, file: BinaryIO, of_page: Callable[[tifffile.TiffPage], T], reason: str
) -> T:
    file.seek(0)
    try:
        with tifffile.TiffFile(file) as tif:
            # Further pages are usually smaller levels of a pyramid, or thumbnails.
            return of_page(tif.pages[0])
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise almost any error there
        raise UserError(
            f"{path}: cannot be read as a picture ({reason}; {reason_of(error)})"
        ) from error


def _pixels(image: Image.Image) -> np.ndarray:
    """Decodes the image and returns uint8 [H, W, 3], turned as its tag says."""
    image.load()
    is_small = image.width * image.height <= _BAND
    pixels = np.array(on_white(image)) if is_small else _in_bands(image)
    # Pillow turns a TIFF itself and then removes the tag.
    return turned(pixels, image.getexif().get(_ORIENTATION, 1))


def _in_bands(image: Image.Image) -> np.ndarray:
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    top = 0
    for band in bands(image):
        pixels[top : top + len(band)] = band
        top += len(band)
    return pixels


def bands(image: Image.Image) -> Iterator[np.ndarray]:
    """Yields a decoded picture on white, from top to bottom, uint8 [rows, W, 3] of about 1 M px.

    Copies of a whole picture of 4 channels would take too much memory.
    """
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield np.asarray(on_white(image.crop((0, top, image.width, bottom))))


def on_white(image: Image.Image) -> Image.Image:
    """Returns the picture as RGB, laid on white where it is transparent."""
    # Pictures without an alpha channel can still declare some of their colours transparent.
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    # Without its alpha, a transparent pixel would show its hidden colour.
    canvas = Image.new("RGBA", image.size, _WHITE)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns a view of pixels [H, W, 3], turned as the tag Orientation says."""
    return _TURNS.get(orientation, lambda x: x)(pixels)
