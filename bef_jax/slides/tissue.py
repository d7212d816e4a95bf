"""Tissue and glass, told apart by the saturation of colours, as for PCam's patches."""

import numpy as np

# Veeling et al. (2018) leave out patches whose greatest saturation, in HSV, is below this.
SATURATION = 0.07
# The index is the greatest of a pixel's three values. If the least of them is below the entry, the
# saturation, (greatest - least) / greatest, is at least 0.07. Black has no saturation.
_GREY_FROM = np.floor((1 - SATURATION) * np.arange(256) + 1e-9).astype(np.uint8) + np.uint8(1)
_GREY_FROM[0] = 0


def is_coloured(pixels: np.ndarray) -> np.ndarray:
    """Returns which pixels have a saturation (HSV) of at least 0.07.

    Args:
        pixels: uint8 [..., 3].

    Returns:
        bool [...].
    """
    # Three planes take a twentieth of the time of max and min over an axis of three.
    red, green, blue = (np.ascontiguousarray(pixels[..., i]) for i in range(3))
    most = np.maximum(np.maximum(red, green), blue)
    least = np.minimum(np.minimum(red, green), blue)
    return least < _GREY_FROM.take(most)
