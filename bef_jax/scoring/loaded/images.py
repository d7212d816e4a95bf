"""Patches of what a user gives a loaded network, and what it says about them."""

import os
from collections.abc import Iterable, Iterator

import numpy as np

from bef_jax.data import inputs
from bef_jax.data.patch import Tiling
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path
from bef_jax.scoring import scorer
from bef_jax.slides.reader import is_slide

# uint8 [N, S, S, 3], an iterator of such arrays, or the path of any input of --mode=predict.
Images = np.ndarray | Iterable[np.ndarray] | str | os.PathLike


def patches_of(images: Images, tiling: Tiling, mpp: float | None = None) -> Iterator[np.ndarray]:
    """Yields patches, uint8 [S, S, 3] each, of an array, an iterator of arrays, or a path.

    Args:
        tiling: how pictures that are larger than a patch are cut. All patches have its side.
        mpp: micrometres per pixel of the network; a picture that says another scale is refused.

    Raises:
        UserError: an array has another shape or type, or the path can't be read.
    """
    if isinstance(images, str | os.PathLike):
        path = user_path(images)
        if path.is_file() and is_slide(path, tiling.side, mpp):
            raise UserError(f"{path}: is a whole slide; give it to predict_slide")
        inputs.check(path, None, tiling.side, mpp)
        return (patch.pixels for patch in inputs.read(path, None, tiling, mpp))
    # A single array, of NumPy, JAX or torch, has a shape. An iterable of arrays has none.
    arrays = [images] if hasattr(images, "shape") else images
    return (patch for array in arrays for patch in _checked(array, tiling.side))


def _checked(array: np.ndarray, side: int) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.shape[1:] != (side, side, 3):
        raise UserError(
            f"images are {array.dtype} {list(array.shape)}: give uint8 [N, {side}, {side}, 3], "
            "RGB in 0 .. 255"
        )
    return array


def join_finite(parts: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Joins probabilities, and raises `RunError` if one of them is not finite.

    Args:
        parts: [n, *shape] each.
        shape: of the probabilities of one patch.
    """
    found = concatenate(parts, np.empty((0, *shape)))
    scorer.check_finite(found, range(len(found)))
    return found


def concatenate(parts: Iterable[np.ndarray], empty: np.ndarray) -> np.ndarray:
    """Joins the parts; `empty` [0, ...] gives the shape and dtype if there are none."""
    return np.concatenate([empty, *parts])
