"""Boosted EfficientNet in JAX and Flax."""

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bef_jax.scoring.loaded import ExportedModel, TrainedModel

# The first line of ours that a command runs, so its time to the first step counts from here. What
# is left out is the interpreter's own start, some 50 ms.
STARTED = time.perf_counter()

__version__ = "0.1.0"


def load(where: str | os.PathLike) -> "TrainedModel | ExportedModel":
    """Returns a trained network that scores patches.

    The result has `predict(images)`, `features(images)` and `gradcam(images)`, and tells its
    `config`, `classes` and `mpp`. Images are uint8 [N, 96, 96, 3]: an array of any length, an
    iterator of arrays, or the path of a picture, a folder, a .npz, a .h5 or a store.

        model = bef_jax.load("runs/b2")
        probabilities = model.predict(images)  # float64 [N]

    Args:
        where: a run's folder (its best checkpoint), a checkpoint's folder, or a file that
            --mode=export wrote, which gives `predict`, `classes` and `mpp` alone.

    Raises:
        UserError: there is none, or it is damaged.
    """
    # Here, so that importing the package alone does not wait for JAX.
    from bef_jax.scoring import loaded

    return loaded.load(where)
