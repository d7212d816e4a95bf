"""Boosted EfficientNet in JAX and Flax."""

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bef_jax.scoring.loaded import ExportedModel, TrainedModel

# A command runs this line of ours first, so its time to the first step counts from here. Not
# counted are the interpreter's own start, about 50 ms, and what ran before `glibc.restart`.
STARTED = time.perf_counter()

__version__ = "0.1.0"


def load(where: str | os.PathLike) -> "TrainedModel | ExportedModel":
    """Returns a trained network that scores patches.

    The result has `predict(images)`, `predict_slide(path)`, `features(images)`, `gradcam(images)`,
    `config`, `classes` and `mpp`. Images are uint8 [N, S, S, 3], where S is the side of the
    network's patches, such as 96: an array of any length, an iterator of arrays, or the path of a
    picture, a folder, a .npz, a .h5 or a store. A whole slide is read by `predict_slide` alone.
    Compiled programs are kept for the next process, where the run's `compile_cache` says, unless
    JAX has a folder for them already.

        model = bef_jax.load("runs/b2")
        probabilities = model.predict(images)  # float64 [N], or [N, K] for K > 2 classes
        slide = model.predict_slide("case1.svs")  # x, y and probabilities of all windows
        picture = slide.to_map()  # float32 [rows, columns], NaN where there is no tissue

    Args:
        where: a run's folder (its best checkpoint), a checkpoint's folder, or a file that
            --mode=export wrote, which has only `predict`, `predict_slide`, `classes` and `mpp`.

    Raises:
        UserError: there is no trained network, or it is damaged.
    """
    # Import it here, so that importing the package alone does not wait for JAX.
    from bef_jax.scoring import loaded

    return loaded.load(where)
