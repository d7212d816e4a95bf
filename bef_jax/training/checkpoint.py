"""Checkpoints: Orbax saves the training state, the configuration and the clock of a run.

    <workdir>/checkpoints/<step>/{state,run,metrics,checksums.json}

`state` is a `TrainState`. `run` is JSON: the configuration, the clock, the sha256 of the data and,
after an evaluation, the operating point. `checksums.json` has the sha256 of each file of state,
run and metrics. Saving is asynchronous and atomic. The newest few checkpoints and the best one by
AUC on the valid split are kept.
"""

import contextlib
import logging
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from jax.sharding import Sharding
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from bef_jax.config import as_json, flatten, validate
from bef_jax.configs import default
from bef_jax.configs.fields import FIELDS, NETWORK, OPTIMIZER
from bef_jax.data.patch import same_classes
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime import distributed
from bef_jax.runtime.files import (
    check_outputs,
    check_regular,
    check_types,
    first_damaged,
    read_json,
    sha256,
    user_path,
    write_json,
)
from bef_jax.runtime.sharding import with_sharding
from bef_jax.training.state import TrainState, abstract_state

LOG = logging.getLogger(__name__)
_AUC = "valid_auc"
CHECKSUMS = "checksums.json"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax is still writing
_STEP = re.compile("0|[1-9][0-9]*")  # the name of a step's folder that Orbax has finished
_SMALL_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding")  # files that Orbax reads whole
_LARGEST_SMALL_FILE = 32 << 20  # bytes
# Orbax and ConfigDict raise these if a file was cut or edited.
_ERRORS_OF_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_HOW_TO_FIX = "move the checkpoint away, or name another one with --checkpoint"


class Checkpoints:
    """The newest checkpoints of one run, and the best one."""

    def __init__(self, workdir: Path, keep: int):
        """Opens or creates <workdir>/checkpoints, which keeps the newest `keep` and the best.

        Raises:
            UserError: nothing can be written there, or what is there is damaged.
        """
        self.directory = Path(workdir).resolve() / "checkpoints"  # Orbax refuses relative paths
        check_outputs(self.directory.parent, output_folders=[self.directory.name])
        self._check_what_is_there()
        # Keep what either policy keeps, so that the best stays when newer ones come. By default,
        # `BestN` would also keep every save between evaluations, because those have no score.
        keep_any = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(get_metric_fn=_auc, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            # The policy decides what is kept, but without a best_fn Orbax writes no metrics.
            best_fn=_auc,
            preservation_policy=keep_any,
            cleanup_tmp_directories=True,  # because a kill leaves half-written ones
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        # Orbax parses each step's _CHECKPOINT_METADATA here. It has no checksum, so damage raises
        # any of these.
        except _ERRORS_OF_DAMAGE as error:
            files = f"{self.directory}/*/_CHECKPOINT_METADATA"
            raise UserError(
                f"{files}: one of these is damaged ({reason_of(error)}); delete these files, "
                "because no checkpoint needs them"
            ) from error

    def _check_what_is_there(self) -> None:
        """Checks what Orbax will read, because it would wait for a FIFO and fail at damage."""
        for step in saved_steps(self.directory.parent):
            _files_below(self.directory / str(step))  # raises if damaged
            _valid_auc(self.directory / str(step))  # raises if damaged
        # Orbax takes digits that are not ASCII for a step number, but does not find its folder.
        for file in self.directory.glob("*"):
            if file.name.isdecimal() and not file.name.isascii():
                raise UserError(f"{file}: is not a checkpoint of a run; move it away")

    def save(self, step: int, state: TrainState, metadata: dict, auc: float | None) -> None:
        """Starts to save `state` and the JSON `metadata`; returns when both are copied.

        It skips a step that is saved already.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(metadata)
        )
        metrics = None if auc is None else {_AUC: auc}
        if step == self._manager.latest_step():  # the run took no step since it resumed
            return
        self._manager.save(step, args=items, metrics=metrics)

    def _write_checksums(self) -> None:
        """Writes checksums.json. Orbax calls this before it renames the complete folder."""
        if not distributed.is_first():
            return
        # This reads each file again, in Orbax's thread: the next save waits, training does not.
        for folder in self.directory.glob(f"*{_UNFINISHED}*"):
            # Hash only the items, because Orbax still adds its commit time to the file
            # _CHECKPOINT_METADATA beside them.
            files = [file for item in folder.glob("*/") for file in item.rglob("*")]
            names = [file.relative_to(folder).as_posix() for file in files if file.is_file()]
            write_json(folder / CHECKSUMS, {name: sha256(folder / name) for name in names})

    def newest(self, at_most: int | None = None) -> Path | None:
        """Returns the folder of the newest checkpoint, up to step `at_most`; None without one."""
        steps = saved_steps(self.directory.parent)
        steps = [step for step in steps if at_most is None or step <= at_most]
        return self.directory / str(steps[-1]) if steps else None

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all saves are on disk, and ends Orbax's threads."""
        self._manager.close()


def _auc(metrics: dict) -> float:
    return metrics[_AUC]


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of all checkpoints in a workdir, in ascending order."""
    directory = Path(workdir).resolve() / "checkpoints"
    # Take only names of digits: an unfinished folder has a suffix until it is complete.
    names = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def best(workdir: Path) -> Path:
    """Returns the folder of the best checkpoint by AUC on the valid split.

    If no checkpoint has an AUC, it is the newest.

    Raises:
        UserError: there is no checkpoint, or a score is damaged.
    """
    # Use no CheckpointManager: it would delete what a run in progress has half written.
    directory, steps = Path(workdir).resolve() / "checkpoints", saved_steps(workdir)
    if not steps:
        raise UserError(f"{directory}: no checkpoint there; train first, or give --checkpoint")
    # Of equal scores, take the later step. A save without an AUC scores -1, below any AUC.
    return directory / str(max(steps, key=lambda step: (_valid_auc(directory / str(step)), step)))


def _valid_auc(path: Path) -> float:
    try:
        return read_json(path / "metrics" / "metrics", _check_auc, _HOW_TO_FIX)[_AUC]
    except FileNotFoundError:  # saved without an AUC, such as between evaluations
        return -1.0


def _check_auc(found: Any) -> None:
    check_types(found, **{_AUC: float})
    if not 0 <= found[_AUC] <= 1:
        raise ValueError(f"{_AUC} is {found[_AUC]}")


# ---- reading ------------------------------------------------------------------------------------


def read_metadata(path: Path) -> dict:
    """Returns `run` of a checkpoint: `config`, and `clock`, `content`, `operating_point` if known.

    `with_defaults` checks the fields of `config`.

    Raises:
        UserError: it does not exist, or is damaged.
    """
    path = _checkpoint_folder(path)
    _check_sha256(path, ["run"])
    # Do not read it with Orbax, which makes JAX start its devices: hosts must connect before that.
    try:
        return read_json(path / "run" / "metadata", _check_metadata, _HOW_TO_FIX)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} can't be read: it has no run/metadata") from error


def _check_metadata(found: Any) -> None:
    check_types(found, config=dict)
    found = {"clock": {}, "content": "", "operating_point": None} | found
    check_types(found, clock=dict, content=str, operating_point=dict | None)
    check_types(found["clock"], **dict.fromkeys(found["clock"], float))
    numbers, point = [*found["clock"].values()], found["operating_point"]
    if point is not None:
        optional = int | float | None  # None if nothing could be chosen on the valid split
        check_types(point, chosen_on=str, temperature=optional, threshold=optional)
        numbers += [point[name] or 0 for name in ("temperature", "threshold")]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")


def read_config(path: Path) -> ConfigDict:
    """Returns the configuration of a checkpoint, with defaults for fields that are newer than it.

    Raises:
        UserError: the checkpoint does not exist or is damaged, or a field is not valid.
    """
    saved = read_metadata(path)["config"]
    with error_context(path):
        return with_defaults(saved)


def with_defaults(saved: dict) -> ConfigDict:
    """Returns a saved configuration, with defaults for fields that are newer than it.

    Raises:
        UserError: a field is unknown to this version, mistyped or impossible.
    """
    # Pass the defaults through JSON, like the saved config, so that both have lists for tuples.
    config = ConfigDict(as_json(default.get_config()))
    sections = [name for name in saved if isinstance(config.get(name), ConfigDict)]
    try:
        check_types(saved, **dict.fromkeys(sections, dict))
        # Accept any type here, because `validate` names the right one in its error.
        with config.ignore_type():
            config.update(saved)
    except _ERRORS_OF_DAMAGE as error:
        raise UserError(f"its config is damaged ({reason_of(error)}); {_HOW_TO_FIX}") from error
    validate(config)
    return config


@contextlib.contextmanager
def error_context(path: Path) -> Iterator[None]:
    """Adds the checkpoint's path to an error about one of its fields."""
    try:
        yield
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error


def restore(path: Path, abstract: TrainState, sharding: Sharding) -> TrainState:
    """Returns the saved state in the shapes of `abstract`, on the devices of `sharding`.

    Raises:
        UserError: it does not exist, is damaged, or has other shapes.
    """
    # Tell Orbax to put each array on the present devices, not on those that saved it.
    placed = with_sharding(abstract, sharding)
    path = _checkpoint_folder(path)
    _check_sha256(path, ["state"])
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(placed))
    try:
        # Use no CheckpointManager, because the folder may be alone, without the rest of its run.
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=wanted)["state"]
    # The parsers of Orbax and tensorstore can raise any kind of error. Each kind means that the
    # checkpoint can't be used.
    except Exception as error:
        raise UserError(f"checkpoint {path} can't be read: {reason_of(error)}") from error


def restore_variables(path: Path, config: ConfigDict, sharding: Sharding) -> dict:
    """Returns the {params, batch_stats} to score with: the checkpoint's average, if it has one.

    Args:
        config: the configuration of the checkpoint (`read_config`).
        sharding: of every array.

    Raises:
        UserError: it is damaged, or has other shapes.
    """
    return restore(path, abstract_state(config), sharding).eval_variables()


def _checkpoint_folder(path: Path) -> Path:
    path = user_path(path).resolve()  # Orbax refuses relative paths
    if not path.is_dir():
        raise UserError(f"{path}: no checkpoint there")
    return path


def _check_sha256(path: Path, items: Iterable[str]) -> None:
    """Checks the sha256 of the files of `items`: Orbax would load a flipped bit as a weight.

    Checkpoints of older versions have no checksums, and are accepted unchecked.
    """
    there = _files_below(path)
    if CHECKSUMS not in there:
        return
    expected = read_json(path / CHECKSUMS, _check_checksums, _HOW_TO_FIX)
    # Hash only these items, so that reading the configuration does not read the weights.
    chosen = {name: value for name, value in expected.items() if name.split("/")[0] in items}
    # Do not open names that `_files_below` did not find, because they may lead out of the folder.
    # If checksums.json names no file of the items, it is damaged, because nothing was compared.
    wrong = sorted(chosen.keys() - there) if chosen else [CHECKSUMS]
    damaged = path / wrong[0] if wrong else first_damaged(path, chosen)
    if damaged:
        raise UserError(f"checkpoint {path} is damaged: {damaged} is not what was saved")


def _check_checksums(found: Any) -> None:
    check_types(found)
    check_types(found, **dict.fromkeys(found, str))


def _files_below(folder: Path) -> set[str]:
    """Returns the names of all files of a checkpoint, with forward slashes.

    Raises:
        UserError: one of them is not a regular file or is too large, or the folder can't be read.
    """
    names, folders = set(), [folder]
    try:
        while folders:
            for file in folders.pop().iterdir():
                # Do not follow a link to a folder: no save makes one, and it could lead anywhere.
                if file.is_dir() and not file.is_symlink():
                    folders.append(file)
                else:
                    _check_file(file)
                    names.add(file.relative_to(folder).as_posix())
    except OSError as error:
        raise UserError(f"checkpoint {folder} can't be read: {reason_of(error)}") from error
    return names


def _check_file(file: Path) -> None:
    check_regular(file)
    if not file.exists():
        raise UserError(f"{file}: links to nothing; {_HOW_TO_FIX}")
    if file.name in _SMALL_FILES and file.stat().st_size > _LARGEST_SMALL_FILE:
        raise UserError(f"{file}: is longer than any that this program writes; {_HOW_TO_FIX}")


# ---- whether it fits ----------------------------------------------------------------------------


def check_fits(saved: dict, config: ConfigDict, path: Path) -> None:
    """Compares the configuration that a checkpoint was trained with to the one given.

    The state of another model, or of another kind of optimiser, can't be loaded. Other differences
    are logged.

    Raises:
        UserError: the state can't be loaded (it names the fields), or a field is not valid.
    """
    with error_context(path):
        old = flatten(with_defaults(saved))
    new = flatten(ConfigDict(as_json(config)))
    # Ignore distributed.*, because the address of the coordinator may differ at every start.
    lasting = [name for name in new if not name.startswith("distributed.")]
    changed = [name for name in lasting if old[name] != new[name]]
    if "data.classes" in changed and same_classes(with_defaults(saved), config):
        changed.remove("data.classes")
    fatal = [name for name in changed if _decides_state(name, old, new)]
    if fatal:
        listed = ", ".join(f"{name} (saved {old[name]!r}, now {new[name]!r})" for name in fatal)
        raise UserError(f"checkpoint {path} was trained with another {listed}")
    for name in changed:
        LOG.warning("config.%s was %r in %s, is %r now", name, old[name], path, new[name])


def _decides_state(name: str, old: dict, new: dict) -> bool:
    """Returns whether another value of a field needs other weights or other optimiser state."""
    field = FIELDS[name]
    if field.off is not None:  # then only on or off counts, not the value
        return (old[name] == field.off) != (new[name] == field.off)
    return field.affects in (NETWORK, OPTIMIZER)
