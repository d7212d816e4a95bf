"""Where tumour is in a slide, as people drew it: TIFF masks, ASAP's XML files and GeoJSON."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np


class Annotation(ABC):
    """The tumour of one slide."""

    @abstractmethod
    def area(
        self, x: float, y: float, scale: tuple[float, float], shape: tuple[int, int]
    ) -> np.ndarray:
        """Returns which pixels of a rectangle are tumour, bool [H, W].

        A pixel is tumour if its centre is.

        Args:
            x: left edge of the rectangle, in pixels of level 0.
            y: its top edge.
            scale: pixels of level 0 for each pixel of the result, in x and y.
            shape: of the result, H and W.
        """


def find_annotation(folder: Path, name: str) -> Path | None:
    """Returns the annotation of the slide `name` (its file's name without suffix) in a folder."""
    raise NotImplementedError


def read_annotation(path: Path, size: tuple[int, int]) -> Annotation:
    """Reads an annotation; `size` is the slide's width and height, in pixels of level 0."""
    raise NotImplementedError
