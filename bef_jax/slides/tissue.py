"""Tissue and glass, told apart by the saturation of colours, as for PCam's patches."""

import numpy as np

# Veeling et al. (2018) leave out patches whose greatest saturation, in HSV, is below this.
SATURATION = 0.07


def is_coloured(pixels: np.ndarray) -> np.ndarray:
    """Returns which pixels have a saturation (HSV) of at least 0.07.

    Args:
        pixels: uint8 [..., 3].

    Returns:
        bool [...].
    """
    most, least = pixels.max(axis=-1), pixels.min(axis=-1)
    # Saturation is (most - least) / most.
    limits = np.floor((1 - SATURATION) * np.arange(256) + 1e-9).astype(np.uint8)
    return (least <= limits[most]) & (most > 0)
