"""Trained networks in Python, as `bef_jax.load` returns them."""

import os

from bef_jax.errors import UserError
from bef_jax.runtime import compile_cache
from bef_jax.runtime.files import check_regular, user_path
from bef_jax.scoring import trained
from bef_jax.scoring.loaded.exported_files import READERS
from bef_jax.scoring.loaded.exported_model import ExportedModel
from bef_jax.scoring.loaded.slide_prediction import SlidePrediction
from bef_jax.scoring.loaded.trained_model import TrainedModel

__all__ = ["ExportedModel", "SlidePrediction", "TrainedModel", "load"]


def load(where: str | os.PathLike) -> TrainedModel | ExportedModel:
    """Returns the trained network at `where`; see `load` in bef_jax/__init__.py."""
    path = user_path(where).resolve()
    if not path.is_dir():
        check_regular(path)
    if path.is_file() and path.suffix in READERS:
        return ExportedModel(path)
    if not path.is_dir():
        raise UserError(
            f"load({str(where)!r}): neither a folder nor an exported file; give a run's folder, a "
            "checkpoint's folder, or a .stablehlo or .onnx file of --mode=export"
        )
    folder = trained.find(path)
    config = trained.scoring_config(folder)
    compile_cache.enable(config.compile_cache)  # as a mode does
    return TrainedModel(folder, config)
