"""Trained networks on disk: finds them by path, and reads the configuration to score with."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bef_jax.config import flatten, validate
from bef_jax.configs import default
from bef_jax.configs.fields import (
    DATA,
    ENVIRONMENT,
    FROM_STORE,
    INPUT,
    NETWORK,
    SCORE,
    SPEED,
    affects,
)
from bef_jax.data import sources
from bef_jax.data.patch import class_names
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path
from bef_jax.training import checkpoint

LOG = logging.getLogger(__name__)

# Scoring sets these fields, which say how training computes blocks, because it needs no gradient.
_SCORING_FORMS = {"mbconv": "layers", "remat": "none"}
# A given --config decides what is scored, where, and how fast, but not the result.
_FROM_CONFIG = (DATA, SPEED, ENVIRONMENT)


def find(where: Path | str) -> Path:
    """Returns the checkpoint's folder: `where` itself, or the best checkpoint of a workdir.

    Raises:
        UserError: a workdir has no checkpoint, or the AUC of one is damaged.
    """
    path = user_path(where).resolve()
    is_checkpoint = (path / "state").is_dir() and (path / "run").is_dir()
    return path if is_checkpoint else checkpoint.best(path)


def workdir_of(path: Path) -> Path:
    """Returns the workdir of the run that a checkpoint belongs to, or else the current folder."""
    return path.parent.parent if path.parent.name == "checkpoints" else Path.cwd()


def scoring_config(
    path: Path, given: ConfigDict | None = None, changes: Mapping[str, Any] | None = None
) -> ConfigDict:
    """Returns the configuration to score with: the checkpoint's, with the user's changes.

    The checkpoint decides the network; its input and its threshold, too, unless `changes` has them.
    A field that is newer than the checkpoint has its default.

    Args:
        path: the checkpoint's folder.
        given: a whole configuration. Only fields that do not decide a probability are used, such
            as data.
        changes: single fields by their dotted names. Fields that decide a probability are used,
            too, but fields of training alone are not.

    Raises:
        UserError: the checkpoint is missing or has a field that this version can't read, or
            `changes` ask for another network.
    """
    config = checkpoint.read_config(path)
    # Use the defaults, because the processes of the training run may be elsewhere, or gone.
    _set(config, _fields_of(default.get_config(), "distributed."))
    if not config.data.mpp and config.data.source in sources.SOURCES:
        # Take the scale from the source of training now, because `given` can name another source.
        _set(config, {"data.mpp": sources.describe(config.data.source).mpp or 0.0})
    changes = _as_json(dict(changes or {}))
    if given is not None:
        validate(given)
        fields = _fields_of(given)
        _log_ignored(flatten(config), fields, changes)
        _set(config, {name: fields[name] for name in fields if affects(name) in _FROM_CONFIG})
    saved = flatten(config)
    differing = {name: x for name, x in changes.items() if saved.get(name) != x}
    _check_network(path, saved, differing)
    for name in sorted(name for name in differing if affects(name) in (INPUT, SCORE)):
        LOG.info("config.%s=%r; the checkpoint has %r", name, differing[name], saved[name])
    # Fields of training alone stay as saved: the checkpoint's arrays fit its own optimiser.
    used = [name for name in changes if affects(name) in (*_FROM_CONFIG, INPUT, SCORE)]
    _set(config, {name: changes[name] for name in used})
    if (side := differing.get("data.patch_size")) is not None:
        # Scoring draws no windows. Without this, `validate` would refuse patches that are smaller
        # than the windows of training.
        _set(config, {"rcc.min_size": side, "rcc.max_size": side})
    config.model.update(_SCORING_FORMS)
    # Validate again, because a change may be invalid together with the saved fields.
    with checkpoint.error_context(path):
        validate(config)
        _check_class_names(config)
    return config


def _check_class_names(config: ConfigDict) -> None:
    """Raises `UserError` unless each output of the network has a name."""
    names, count = class_names(config), config.model.num_classes
    if len(names) != count or not all(isinstance(name, str) for name in names):
        raise UserError(f"config.data.classes does not name {count} classes; use another")


def _fields_of(config: ConfigDict, start: str = "") -> dict[str, Any]:
    """Returns the fields whose names begin with `start`, by their dotted names."""
    fields = flatten(ConfigDict(_as_json(config.to_dict())))
    return {name: value for name, value in fields.items() if name.startswith(start)}


def _as_json(fields: dict) -> dict:
    """Returns the fields with lists instead of tuples, as a saved configuration has them."""
    return json.loads(json.dumps(fields))


def _set(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    # A saved field may be empty, or an integer instead of a float. `validate` checks them.
    with config.ignore_type():
        config.update_from_flattened_dict(fields)


def _check_network(path: Path, saved: Mapping[str, Any], differing: Mapping[str, Any]) -> None:
    fixed = [name for name in differing if affects(name) == NETWORK]
    if fixed:
        listed = ", ".join(f"{name}={saved.get(name)}" for name in fixed)
        flags = ", ".join(f"--config.{name}" for name in fixed)
        raise UserError(f"checkpoint {path} is a network with {listed}: leave out {flags}")


def _log_ignored(
    saved: Mapping[str, Any], given: Mapping[str, Any], changes: Mapping[str, Any]
) -> None:
    """Logs the fields in which the checkpoint decides, and --config has another value."""
    open_fields = [name for name in FROM_STORE if not given.get(name)]
    decided = [
        name
        for name in saved
        if affects(name) in (NETWORK, INPUT, SCORE) and name not in open_fields
    ]
    for name in decided:
        if name not in changes and given.get(name) != saved[name]:
            LOG.info(
                "config.%s=%r: the checkpoint decides this field, not --config", name, saved[name]
            )
