"""Checkpoints: the training state, the configuration and the clocks, by Orbax.

    <workdir>/checkpoints/<step>/{state,run,metrics,checksums.json}

`state` is a `TrainState`; `run` is JSON: the configuration and what the run has counted so far.
`checksums.json` has the sha256 of each file. Saving is asynchronous and atomic. The newest few and
the best by valid AUC are kept.
"""

import contextlib
import logging
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from bef_jax.config import as_json, flatten, validate
from bef_jax.configs import default
from bef_jax.configs.fields import FIELDS, NETWORK, OPTIMIZER
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
from bef_jax.training.state import TrainState, abstract_state

LOG = logging.getLogger(__name__)
_BEST = "valid_auc"
CHECKSUMS = "checksums.json"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax is still writing
_STEP = re.compile("0|[1-9][0-9]*")  # as Orbax names the folder of a step, once that is whole
_TEXTS = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding")  # which Orbax reads whole
_LONGEST_TEXT = 32 << 20  # bytes
# What Orbax and ConfigDict raise at content that was cut or edited.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_FIX = "move the checkpoint away, or name another one by --checkpoint"


class Checkpoints:
    """The checkpoints of one run, newest and best."""

    def __init__(self, workdir: Path, keep: int):
        """Opens (or begins) <workdir>/checkpoints; `keep` newest are kept besides the best.

        Raises:
            UserError: nothing can be written there, or what is there is damaged.
        """
        self.directory = Path(workdir).resolve() / "checkpoints"  # Orbax refuses relative paths
        check_outputs(self.directory.parent, folders=[self.directory.name])
        self._check_what_is_there()
        # Any: the best stays when newer ones have come. `BestN` would else keep every save between
        # evaluations, as these have no score.
        keep_any = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(get_metric_fn=_auc, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            # What is kept, the policy decides; but without a best_fn Orbax writes no metrics.
            best_fn=_auc,
            preservation_policy=keep_any,
            cleanup_tmp_directories=True,  # what a kill left half would stay for ever
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        # Of these files, which have no checksum, Orbax raises whatever its parser meets.
        except _DAMAGE as error:
            damaged = f"{self.directory}: a _CHECKPOINT_METADATA in it is damaged"
            raise UserError(f"{damaged} ({reason_of(error)}); delete that file") from error

    def _check_what_is_there(self) -> None:
        """Looks at what Orbax will read: at a FIFO it would wait, at damage it fails."""
        for step in saved_steps(self.directory.parent):
            _files_below(self.directory / str(step))
            _score(self.directory / str(step))
        # Digits of another script are a number to Orbax, of a folder that it does not find.
        for file in self.directory.glob("*"):
            if file.name.isdecimal() and not file.name.isascii():
                raise UserError(f"{file}: is no checkpoint of a run; move it away")

    def save(self, step: int, state: TrainState, run: dict, auc: float | None) -> None:
        """Starts a save of `state` and the JSON `run`; the call returns once both are copied."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        metrics = None if auc is None else {_BEST: auc}
        if step == self._manager.latest_step():  # stopped again before the first step
            return
        self._manager.save(step, args=items, metrics=metrics)

    def _write_checksums(self) -> None:
        """Called in the background, when a save's files are complete and not yet renamed."""
        # Each file is read once more, in Orbax's thread: the next save waits for it, no step does.
        for folder in self.directory.glob(f"*{_UNFINISHED}*") if distributed.is_first() else ():
            # Of the items alone: to the file beside them Orbax adds the time of its commit.
            files = [file for item in folder.glob("*/") for file in item.rglob("*")]
            names = [file.relative_to(folder).as_posix() for file in files if file.is_file()]
            write_json(folder / CHECKSUMS, {name: sha256(folder / name) for name in names})

    def newest(self, at_most: int | None = None) -> Path | None:
        """Returns the folder of the newest checkpoint on disk, or of the newest up to a step."""
        steps = saved_steps(self.directory.parent)
        steps = [step for step in steps if at_most is None or step <= at_most]
        return self.directory / str(steps[-1]) if steps else None

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits likewise, and ends Orbax's threads."""
        self._manager.close()


def _auc(metrics: dict) -> float:
    return metrics[_BEST]


def saved_steps(workdir: Path) -> list[int]:
    """The steps that a workdir has checkpoints of, ascending."""
    directory = Path(workdir).resolve() / "checkpoints"
    # Digits alone: what is being written has a suffix until it is whole.
    names = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def best(workdir: Path) -> Path:
    """The folder of the best checkpoint by valid AUC in a workdir, or the newest without one.

    Raises:
        UserError: there is none, or a score is damaged.
    """
    # Not by a manager, which would delete what a run that goes on has half written.
    directory, steps = Path(workdir).resolve() / "checkpoints", saved_steps(workdir)
    if not steps:
        raise UserError(f"{directory}: no checkpoint there; train first, or give --checkpoint")
    # Of equal scores the later; that of a save between evaluations is below any AUC.
    return directory / str(max(steps, key=lambda step: (_score(directory / str(step)), step)))


def _score(path: Path) -> float:
    try:
        return read_json(path / "metrics" / "metrics", _check_score, _FIX)[_BEST]
    except FileNotFoundError:  # saved between evaluations
        return -1.0


def _check_score(found: Any) -> None:
    check_types(found, **{_BEST: float})
    if not 0 <= found[_BEST] <= 1:
        raise ValueError(f"{_BEST} is {found[_BEST]}")


# ---- reading ------------------------------------------------------------------------------------


def read_metadata(path: Path) -> dict:
    """Returns the JSON beside a checkpoint's state: `config` and what the run has counted.

    Those of older versions have less than that, but all have `config`, whose fields `complete`
    checks.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = _existing(path)
    _verify(path, ["run"])
    # Not through Orbax: it asks JAX for its devices, and hosts may only meet before that.
    try:
        return read_json(path / "run" / "metadata", _check_metadata, _FIX)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} can't be read: it has no run/metadata") from error


def _check_metadata(found: Any) -> None:
    check_types(found, config=dict)
    found = {"clock": {}, "content": "", "operating_point": None} | found
    check_types(found, clock=dict, content=str, operating_point=dict | None)
    check_types(found["clock"], **dict.fromkeys(found["clock"], float))
    figures, point = [*found["clock"].values()], found["operating_point"]
    if point is not None:
        figure = int | float | None  # None where valid has one class, for which none is best
        check_types(point, chosen_on=str, temperature=figure, threshold=figure)
        figures += [point[name] or 0 for name in ("temperature", "threshold")]
    if not all(map(math.isfinite, figures)):
        raise ValueError("a figure that is not finite")


def read_config(path: Path) -> ConfigDict:
    """Returns the configuration of a checkpoint, with defaults for fields that are newer than it.

    Raises:
        UserError: the checkpoint is not there or damaged, or a field is not as it must be.
    """
    saved = read_metadata(path)["config"]
    with naming(path):
        return complete(saved)


def complete(saved: dict) -> ConfigDict:
    """Returns a saved configuration, with defaults for fields that are newer than it.

    Raises:
        UserError: a field is unknown to this version, mistyped or impossible.
    """
    # Through JSON, as the saved one went: both have lists for tuples.
    config = ConfigDict(as_json(default.get_config()))
    sections = [name for name in saved if isinstance(config.get(name), ConfigDict)]
    try:
        check_types(saved, **dict.fromkeys(sections, dict))
        # Whatever the type: `validate` says which one it should be.
        with config.ignore_type():
            config.update(saved)
    except _DAMAGE as error:
        raise UserError(f"its config is damaged ({reason_of(error)}); {_FIX}") from error
    validate(config)
    return config


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts into an error that is raised inside, and names a field, whose field it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error


def restore(path: Path, abstract: TrainState, sharding: Sharding) -> TrainState:
    """Reads a state into the shapes of `abstract`, onto the devices of `sharding`.

    Raises:
        UserError: it is not there, damaged, or of other shapes.
    """
    # Tells Orbax where each array goes: to the devices of now, not to those that saved it.
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )
    path = _existing(path)
    _verify(path, ["state"])
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(placed))
    try:
        # No manager: this may be any folder, without the rest of its run.
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=wanted)["state"]
    # Orbax and tensorstore raise whatever their parsers meet: each kind means that the checkpoint
    # can't be used.
    except Exception as error:
        raise UserError(f"checkpoint {path} can't be read: {reason_of(error)}") from error


def restore_variables(path: Path, config: ConfigDict, sharding: Sharding) -> dict:
    """Returns {params, batch_stats} of a checkpoint to score with: the average, if it kept one.

    Args:
        config: with which the checkpoint was trained, completed (`read_config`).
        sharding: of every array.

    Raises:
        UserError: it is damaged, or of other shapes.
    """
    return restore(path, abstract_state(config), sharding).eval_variables()


def _existing(path: Path) -> Path:
    path = user_path(path).resolve()  # Orbax refuses relative paths
    if not path.is_dir():
        raise UserError(f"{path}: no checkpoint there")
    return path


def _verify(path: Path, items: Iterable[str]) -> None:
    """Compares the files of `items` with their sha256: Orbax would load a flipped bit as a weight.

    Checkpoints of older versions carry none, and are taken as they are.
    """
    there = _files_below(path)
    if CHECKSUMS not in there:
        return
    expected = read_json(path / CHECKSUMS, _check_sums, _FIX)
    # Whoever wants the configuration alone need not have the weights hashed.
    chosen = {name: value for name, value in expected.items() if name.split("/")[0] in items}
    # Names that a walk did not find are not looked up: they may lead out of the folder. A list
    # that names no file of the items would let everything pass.
    missing = sorted(chosen.keys() - there) if chosen else [CHECKSUMS]
    damaged = path / missing[0] if missing else first_damaged(path, chosen)
    if damaged:
        raise UserError(f"checkpoint {path} is damaged: {damaged} is not what was saved")


def _check_sums(found: Any) -> None:
    check_types(found)
    check_types(found, **dict.fromkeys(found, str))


def _files_below(folder: Path) -> set[str]:
    """Returns the names of all files of a checkpoint, with forward slashes.

    Raises:
        UserError: one of them is not as Orbax may open it, or the folder can't be read.
    """
    names, folders = set(), [folder]
    try:
        while folders:
            for file in folders.pop().iterdir():
                # A link to a folder is none that was saved, and could lead anywhere.
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
        raise UserError(f"{file}: links to nothing; {_FIX}")
    if file.name in _TEXTS and file.stat().st_size > _LONGEST_TEXT:
        raise UserError(f"{file}: longer than any that is written; {_FIX}")


# ---- whether it fits ----------------------------------------------------------------------------


def check_fits(saved: dict, config: ConfigDict, path: Path) -> None:
    """Compares the configuration that a checkpoint was trained with to the one given.

    Another model, or other optimiser state, can't be loaded; other differences are logged.

    Raises:
        UserError: naming the fields that differ, or one that is not as it must be.
    """
    with naming(path):
        old = flatten(complete(saved))
    new = flatten(ConfigDict(as_json(config)))
    # Where processes meet may be elsewhere at every start.
    lasting = [name for name in new if not name.startswith("distributed.")]
    changed = [name for name in lasting if old[name] != new[name]]
    fatal = [name for name in changed if _decides_state(name, old, new)]
    if fatal:
        listed = ", ".join(f"{name} (saved {old[name]!r}, now {new[name]!r})" for name in fatal)
        raise UserError(f"checkpoint {path} was trained with another {listed}")
    for name in changed:
        LOG.warning("config.%s was %r in %s, is %r now", name, old[name], path, new[name])


def _decides_state(name: str, old: dict, new: dict) -> bool:
    """Returns whether another value of a field needs other weights or other optimiser state."""
    field = FIELDS[name]
    if field.off is not None:  # then it counts whether it is on, and not how large it is
        return (old[name] == field.off) != (new[name] == field.off)
    return field.affects in (NETWORK, OPTIMIZER)
