"""Trained networks on disk: found by name, with the configuration and the variables that score."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bef_jax.config import flatten, validate
from bef_jax.configs import default
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path
from bef_jax.training import checkpoint

LOG = logging.getLogger(__name__)

# How blocks are computed in training; scoring needs no gradient.
_FORMS = {"mbconv": "layers", "remat": "none"}
# Of these --config decides where it is given: what is scored, where, and how fast, not the score.
_SURROUNDINGS = ("data.", "predict.", "benchmark.", "distributed.", "compile_cache")
_SPEED = ("eval.batch_size", "model.depthwise")
# Fields that, besides the network's own, decide what a patch's score is.
_DECIDING = (
    "dtype",
    "augment.mean",
    "augment.std",
    "rcc.enabled",
    "rcc.eval_size",
    "eval.tta",
    "eval.threshold",
)


def find(where: Path | str) -> Path:
    """Returns the checkpoint's folder that `where` means: that folder, or the best of a workdir.

    Raises:
        UserError: a workdir without a checkpoint, or whose scores are damaged.
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
    """Returns the configuration to score with: that of the checkpoint, and what the user changed.

    The checkpoint decides the network, its input and its threshold. A field that is newer than the
    checkpoint has its default.

    Args:
        path: the checkpoint's folder.
        given: a whole configuration, of which data and what else decides no score count.
        changes: single fields by their dotted names. Those that have to do with a score count.

    Raises:
        UserError: no such checkpoint, a field of it that this version can't read, or `changes` ask
            for another network.
    """
    config = checkpoint.read_config(path)
    # The processes of the training run may have met elsewhere, or be gone.
    _set(config, _fields_of(default.get_config(), "distributed."))
    changes = _as_json(dict(changes or {}))
    if given is not None:
        fields = _fields_of(given)
        _log_ignored(flatten(config), fields, changes)
        _set(config, {name: fields[name] for name in fields if _is_free(name)})
    saved = flatten(config)
    differing = {name: x for name, x in changes.items() if saved.get(name) != x}
    _check_network(path, saved, differing)
    for name in sorted(set(differing) & {*_DECIDING}):
        LOG.info("config.%s=%r; the checkpoint has %r", name, differing[name], saved[name])
    # Not what belongs to training alone: the checkpoint's arrays are those of its own optimiser.
    _set(config, {name: x for name, x in changes.items() if _is_free(name) or name in _DECIDING})
    config.model.update(_FORMS)
    # Again, since a change may be impossible beside what was saved.
    with checkpoint.naming(path):
        validate(config)
    return config


def _fields_of(config: ConfigDict, start: str = "") -> dict[str, Any]:
    """The fields whose names begin with `start`, by their dotted names."""
    fields = flatten(ConfigDict(_as_json(config.to_dict())))
    return {name: value for name, value in fields.items() if name.startswith(start)}


def _as_json(fields: dict) -> dict:
    """Lists for tuples, as a saved configuration has them."""
    return json.loads(json.dumps(fields))


def _set(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    # A saved field may be empty, or an integer where a float is meant; `validate` knows.
    with config.ignore_type():
        config.update_from_flattened_dict(fields)


def _is_free(name: str) -> bool:
    return name.startswith(_SURROUNDINGS) or name in _SPEED


def _is_network(name: str) -> bool:
    how = _SPEED + tuple(f"model.{form}" for form in _FORMS)
    return name.startswith("model.") and name not in how


def _check_network(path: Path, saved: Mapping[str, Any], differing: Mapping[str, Any]) -> None:
    fixed = [name for name in differing if _is_network(name)]
    if fixed:
        listed = ", ".join(f"{name}={saved.get(name)}" for name in fixed)
        flags = ", ".join(f"--config.{name}" for name in fixed)
        raise UserError(f"checkpoint {path} is a network with {listed}: leave out {flags}")


def _log_ignored(
    saved: Mapping[str, Any], given: Mapping[str, Any], changes: Mapping[str, Any]
) -> None:
    """Names what --config's file says otherwise, where the checkpoint decides."""
    decided = [name for name in saved if name in _DECIDING or _is_network(name)]
    for name in decided:
        if name not in changes and given.get(name) != saved[name]:
            LOG.info("config.%s=%r, as the checkpoint has it", name, saved[name])
