"""Reads TIFF slides with tifffile, where OpenSlide refuses them or isn't installed."""

import functools
import itertools
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC

from bef_jax.data.pictures import LIMIT, jpeg
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file
from bef_jax.slides.readers.base import Region, Slide, common_scale, levels_of
from bef_jax.slides.readers.cache import ArrayCache
from bef_jax.slides.readers.tiff_pages import levels, scales

_CACHE = 256 << 20  # bytes of decoded strips and tiles
_ORIENTATION = 274
_JPEG_2000 = (COMPRESSION.APERIO_JP2000_RGB, COMPRESSION.JPEG_2000_LOSSY, COMPRESSION.JPEG2000)
# Their decoders take memory for the size that the tag says, or that can be seen in the data.
_COMPRESSIONS = (
    COMPRESSION.NONE,
    COMPRESSION.LZW,
    COMPRESSION.ADOBE_DEFLATE,
    COMPRESSION.DEFLATE,
    COMPRESSION.PACKBITS,
    COMPRESSION.ZSTD,
    COMPRESSION.JPEG,
    COMPRESSION.WEBP,  # at most 16,383 x 16,383 pixels
    *_JPEG_2000,
)
_GRAY = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.PALETTE)
_NOTHING = np.empty((0, 0, 3), np.uint8)
_ASSOCIATED, _UNASSOCIATED = 1, 2  # kinds of alpha: colours are multiplied by it, or not


class TiffReader(Slide):
    """A slide that tifffile reads.

    The file is read at given places, and decoders need no Python, so threads read at once.
    """

    def __init__(self, path: Path, mpp: float | None) -> None:
        """Opens the slide; see `reader.open_slide`.

        Raises:
            UserError: tifffile cannot read it, or its pixels are not square.
        """
        self.path = path
        self._file = None
        try:
            self._file = open_user_file(path)
            tif = tifffile.TiffFile(self._file)
            self._pages = levels(tif)
            self._decode = [_decoder(page) for page in self._pages]
            # Read them here, because tifffile reads tags when they are first asked for.
            self._places = [(page.dataoffsets, page.databytecounts) for page in self._pages]
            said = scales(tif)
            self._check()
        except Exception as error:  # a damaged file can raise almost any error there
            self.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be read as a TIFF ({reason_of(error)})") from error
        self._length = os.fstat(self._file.fileno()).st_size
        self._cache = ArrayCache(_CACHE)
        self.levels = levels_of(path, [(page.imagewidth, page.imagelength) for page in self._pages])
        self.mpp = mpp or common_scale(path, *said)
        self.reader = f"tifffile {'svs' if tif.is_svs else 'ome' if tif.is_ome else 'tiff'}"

    def _check(self) -> None:
        for page in self._pages:
            if reason := _unsupported(page):
                raise UserError(f"{self.path}: {reason}; convert it to a tiled RGB TIFF of 8 bits")

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """See `Slide.read`."""
        pixels = np.full((height, width, 3), 255, np.uint8)
        failed = np.zeros((height, width), bool)
        long, wide = _segment_shape(self._pages[level])
        across = -(-self.levels[level].width // wide)
        rows = range(y // long, (y + height - 1) // long + 1)
        columns = range(x // wide, (x + width - 1) // wide + 1)
        for row, column in itertools.product(rows, columns):
            top, left = max(row * long, y), max(column * wide, x)
            place = np.s_[top - y : (row + 1) * long - y, left - x : (column + 1) * wide - x]
            target = pixels[place]
            segment = self._segment(level, row * across + column)
            top, left = top - row * long, left - column * wide
            part = segment[top : top + len(target), left : left + target.shape[1]]
            # Damaged headers give segments other shapes.
            if part.shape == target.shape:
                target[:] = part
            else:
                failed[place] = True
        return Region(pixels, failed if failed.any() else None)

    def _segment(self, level: int, index: int) -> np.ndarray:
        make = functools.partial(self._read_segment, level, index)
        return self._cache.get((level, index), make)

    def _read_segment(self, level: int, index: int) -> np.ndarray:
        """Returns a strip or tile, uint8 [h, w, 3]; h and w are 0 if it cannot be decoded."""
        page, (_, counts) = self._pages[level], self._places[level]
        is_whole = page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        # Otherwise each channel has its own segments, one channel after the other.
        step = len(counts) if is_whole else len(counts) // page.samplesperpixel
        try:
            parts = range(index, len(counts), step)
            if not any(counts[part] for part in parts):
                # Writers leave out what was not scanned; a count that is missing is damage.
                return np.full((*_segment_shape(page), 3), 255, np.uint8) if parts else _NOTHING
            samples = [self._samples(level, part) for part in parts]
            return _to_rgb(np.concatenate(samples, axis=-1) if samples[1:] else samples[0], page)
        except MemoryError:
            raise
        except Exception:  # decoders raise errors of any kind for damaged data
            return _NOTHING

    def _samples(self, level: int, index: int) -> np.ndarray:
        """Returns the samples of a segment, uint8 [h, w, S]."""
        offsets, counts = self._places[level]
        offset, count = offsets[index], counts[index]
        if offset + count > self._length:
            raise ValueError("it ends outside of the file")
        data = os.pread(self._file.fileno(), count, offset)
        _check_declared(data, self._pages[level])
        return self._decode[level](data, index)[0][0]

    def close(self) -> None:
        """See `Slide.close`."""
        if self._file:
            self._file.close()


def _decoder(page: tifffile.TiffPage) -> Callable:
    # tifffile makes the function when it is first asked for, which threads must not do at once.
    return functools.partial(page.decode, jpegtables=page.jpegtables, jpegheader=page.jpegheader)


def _segment_shape(page: tifffile.TiffPage) -> tuple[int, int]:
    """Returns the height and width of strips or tiles, in pixels."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def _unsupported(page: tifffile.TiffPage) -> str | None:
    """Returns why a page cannot be read, or None if it can."""
    orientation = page.tags.valueof(_ORIENTATION, 1)
    if page.compression not in _COMPRESSIONS:
        return f"its compression {page.compression} is not supported"
    if page.dtype != np.uint8 or page.imagedepth != 1 or page.tiledepth > 1:
        return "its pixels do not have 8 bits"
    if not _has_known_colours(page):
        return "its colours are not RGB or gray"
    if math.prod(_segment_shape(page)) > LIMIT:
        return f"its strips or tiles are above {LIMIT:,} pixels"
    if orientation != 1:
        return "its Orientation tag turns it"
    return None


def _has_known_colours(page: tifffile.TiffPage) -> bool:
    if page.photometric in _GRAY:
        return page.samplesperpixel == 1
    # tifffile decodes the YCbCr of a JPEG to RGB.
    becomes_rgb = (
        page.compression == COMPRESSION.JPEG and page.photometric == PHOTOMETRIC.YCBCR
    ) or page.photometric == PHOTOMETRIC.RGB
    return becomes_rgb and page.samplesperpixel in (3, 4)


def _check_declared(data: bytes, page: tifffile.TiffPage) -> None:
    """Raises ValueError if encoded data says a size that is not that of its strip or tile."""
    if page.compression == COMPRESSION.JPEG:
        size = jpeg.declared_size((page.jpegheader or b"") + data)
    elif page.compression in _JPEG_2000:
        size = _jpeg_2000_size(data)
    else:
        return
    # Rows of a last strip may be more than are used.
    if size is None or math.prod(size) > 2 * math.prod(_segment_shape(page)):
        raise ValueError("its data has another size")


def _jpeg_2000_size(data: bytes) -> tuple[int, int] | None:
    """Returns the sides that a code stream declares (ISO 15444-1, annex A.5.1)."""
    start = data.find(b"\xff\x4f\xff\x51")
    return struct.unpack_from(">II", data, start + 8) if start >= 0 else None


def _to_rgb(samples: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    """Returns uint8 [h, w, 3], laid on white, from the samples of a segment [h, w, S]."""
    if page.photometric == PHOTOMETRIC.PALETTE:
        return (page.colormap >> 8).astype(np.uint8).T[samples[..., 0]]
    if page.photometric in _GRAY:
        gray = samples if page.photometric == PHOTOMETRIC.MINISBLACK else 255 - samples
        return np.repeat(gray, 3, axis=-1)
    return _on_white(samples, page.extrasamples[0]) if samples.shape[-1] == 4 else samples


def _on_white(samples: np.ndarray, kind: int) -> np.ndarray:
    colours, alpha = samples[..., :3], samples[..., 3:]
    if kind not in (_ASSOCIATED, _UNASSOCIATED) or alpha.min() == 255:
        return np.ascontiguousarray(colours)
    wide = colours.astype(np.uint16)
    if kind == _UNASSOCIATED:
        wide = (wide * alpha + 127) // 255
    return np.minimum(wide + (255 - alpha), 255).astype(np.uint8)
