"""A small checkpoint, for tests that save and read one."""

from pathlib import Path

import jax
import numpy as np

from bef_jax.runtime import sharding
from bef_jax.training import checkpoint
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.state import TrainState

STATE = TrainState(np.int32(3), {"kernel": np.arange(6, dtype=np.float32)}, {}, None, ())


def save(workdir: Path) -> Path:
    """Saves a checkpoint, as after an evaluation, and returns its folder."""
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(3, STATE, {"config": {"name": "tiny"}}, auc=0.5)
    checkpoints.close()
    return workdir / "checkpoints" / "3"


def read(path: Path) -> tuple[TrainState, dict]:
    """Returns the restored state, and what the checkpoint says of its run."""
    everywhere = sharding.replicated(sharding.make_mesh())
    abstract = jax.eval_shape(lambda: STATE)
    return checkpoint.restore(path, abstract, everywhere), checkpoint.read_metadata(path)
