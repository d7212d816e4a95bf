"""Reads pictures as slides of one level: PNG, JPEG, WebP and BMP have no parts to read one by one.

Such a picture is decoded once. That takes 4 bytes of memory for each pixel (1 for gray), and until
the slide is closed 3 bytes of disk in the folder of temporary files.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from bef_jax.data.pictures import reading
from bef_jax.data.pictures.silence import SILENCE
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file
from bef_jax.slides.readers.base import Region, Slide, levels_of

_LIMIT = 1 << 30  # pixels, which take 4 GiB while they are decoded
# What opens them, by how they start. Image.open itself refuses more than 179 million pixels.
_FORMATS: dict[bytes, Callable[[BinaryIO], Image.Image]] = {
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.jpeg_factory,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}
_ORIENTATION = 274


class PictureReader(Slide):
    """A picture in a temporary file, from which threads read at once."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        """Decodes the picture; see `reader.open_slide`.

        Raises:
            UserError: it cannot be decoded, is too large, or there is no room for its pixels.
        """
        self.path, self.mpp = path, mpp
        try:
            with open_user_file(path) as file, SILENCE:
                image = _opened(path, file)
                self._pixels = _on_disk(path, image)
                self.reader = f"pillow {image.format.lower()}"
        except UserError:
            raise
        except Exception as error:  # Pillow's decoders raise errors of any kind for a damaged file
            raise UserError(f"{path}: cannot be read as a picture ({reason_of(error)})") from error
        height, width = self._pixels.shape[:2]
        self.levels = levels_of(path, [(width, height)])

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """See `Slide.read`."""
        return Region(np.ascontiguousarray(self._pixels[y : y + height, x : x + width]))

    def close(self) -> None:
        """See `Slide.close`."""
        self._pixels = None


def pixel_count(path: Path) -> int:
    """Returns how many pixels a picture has by its header; 0 if it is none of these formats."""
    try:
        with open_user_file(path) as file, SILENCE:
            image = _image(file)
            return image.width * image.height if image else 0
    except Exception:  # a damaged file can raise almost any error in Pillow
        return 0


def _opened(path: Path, file: BinaryIO) -> Image.Image:
    image = _image(file)
    if image is None:
        raise UserError(f"{path}: cannot be read as a slide or picture; name another file")
    if image.width * image.height > _LIMIT:
        raise UserError(
            f"{path}: {image.width}x{image.height} pixels are above {_LIMIT:,}, and this format is "
            "read at once; write it as a tiled TIFF, such as with vips tiffsave --tile"
        )
    reading.header_of(path, image)
    return image


def _image(file: BinaryIO) -> Image.Image | None:
    """Returns an image whose pixels are not read yet; None if it has none of these formats."""
    start = file.read(4)
    file.seek(0)
    known = (opener for begin, opener in _FORMATS.items() if start.startswith(begin))
    opener = next(known, None)
    return opener(file) if opener else None


def _on_disk(path: Path, image: Image.Image) -> np.ndarray:
    """Decodes an image; returns uint8 [H, W, 3], a map of a file that has no name any more."""
    image.load()
    with tempfile.TemporaryFile() as file:
        try:
            # Write it, because to store into a map of a full disk ends the process.
            for band in reading.bands(image):
                file.write(band)
            file.flush()
        except OSError as error:
            raise UserError(
                f"{path}: its pixels cannot be kept in {tempfile.gettempdir()} "
                f"({reason_of(error)}); name a folder with more room in TMPDIR"
            ) from error
        pixels = np.memmap(file, np.uint8, "r", shape=(image.height, image.width, 3))
    return reading.turned(pixels, image.getexif().get(_ORIENTATION, 1))
