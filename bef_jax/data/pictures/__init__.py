"""Pictures: where they are, what their headers say, their pixels, and their tiles.

They are read here alone, so that the same file gives the same pixels in training and in predict.
"""

from bef_jax.data.pictures.folders import SUFFIXES, Kind, find, list_folder, walk
from bef_jax.data.pictures.reading import (
    LIMIT,
    Check,
    Header,
    Tile,
    check_size,
    fit_for,
    look,
    positions,
    read,
    tiles,
)

__all__ = [
    "LIMIT",
    "SUFFIXES",
    "Check",
    "Header",
    "Kind",
    "Tile",
    "check_size",
    "find",
    "fit_for",
    "list_folder",
    "look",
    "positions",
    "read",
    "tiles",
    "walk",
]
