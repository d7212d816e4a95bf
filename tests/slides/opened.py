"""Opens a slide with one of the two libraries that read tiled TIFF."""

from pathlib import Path

import pytest

from bef_jax.slides.reader import Slide, open_slide
from bef_jax.slides.readers.with_tifffile import TiffReader

READERS = ["openslide", "tifffile"]


def opened(library: str, path: Path, mpp: float | None = None) -> Slide:
    """Returns the slide that the library reads; without OpenSlide the test is skipped."""
    if library == "openslide":
        pytest.importorskip("openslide")
        return open_slide(path, mpp)
    return TiffReader(path, mpp)
