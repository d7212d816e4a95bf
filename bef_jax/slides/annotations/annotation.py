"""What every kind of annotation can say."""

from abc import ABC, abstractmethod

import numpy as np


class Annotation(ABC):
    """The tumour of one slide."""

    @abstractmethod
    def area(
        self, x: float, y: float, scale: tuple[float, float], shape: tuple[int, int]
    ) -> np.ndarray:
        """Returns which pixels of a rectangle are tumour, bool [H, W].

        A pixel is tumour if its centre is. Outside of the slide nothing is. Several threads may
        call it at once.

        Args:
            x: left edge of the rectangle, in pixels of level 0.
            y: its top edge.
            scale: pixels of level 0 for each pixel of the result, in x and y.
            shape: of the result, H and W.

        Raises:
            UserError: a file of pixels can no longer be read.
        """
