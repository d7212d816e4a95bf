"""Checkpoints: the training state, the configuration and the clocks, by Orbax.

    <workdir>/checkpoints/<step>/{state,run,metrics,checksums.json}

`state` is a `TrainState`; `run` is JSON: the configuration and what the run has counted so far.
`checksums.json` has the sha256 of each file. Saving is asynchronous and atomic. The newest few and
the best by valid AUC are kept.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from bef_jax import distributed
from bef_jax.config import flatten
from bef_jax.configs import default
from bef_jax.data.checksums import first_damaged, sha256
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path, write_json
from bef_jax.state import TrainState

LOG = logging.getLogger(__name__)
_BEST = "valid_auc"
CHECKSUMS = "checksums.json"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax is still writing


class Checkpoints:
    """The checkpoints of one run, newest and best."""

    def __init__(self, workdir: Path, keep: int):
        """Opens (or begins) <workdir>/checkpoints; `keep` newest are kept besides the best."""
        self.directory = Path(workdir).resolve() / "checkpoints"  # Orbax refuses relative paths
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
        self._manager = ocp.CheckpointManager(self.directory, options=options)

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

    def latest(self) -> Path | None:
        """The newest checkpoint's folder."""
        step = self._manager.latest_step()
        return None if step is None else self.directory / str(step)

    def older_than(self, path: Path) -> Path | None:
        """The newest checkpoint before the one at `path`."""
        steps = [step for step in self._manager.all_steps() if step < int(path.name)]
        return self.directory / str(max(steps)) if steps else None

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
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


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
    file = path / "metrics" / "metrics"
    try:
        return float(json.loads(file.read_text())[_BEST])
    except FileNotFoundError:  # saved between evaluations
        return -1.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: name the checkpoint by --checkpoint") from error


def read_run(path: Path) -> dict:
    """The JSON beside a checkpoint's state: `config` and what the run has counted.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = _existing(path)
    _verify(path, ["run"])
    # Not through Orbax: it asks JAX for its devices, and hosts may only meet before that.
    try:
        return json.loads((path / "run" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} can't be read: {error}") from error


def complete(saved: dict) -> ConfigDict:
    """The configuration of a checkpoint, with defaults for fields that are newer than it."""
    # Through JSON, as the saved one went: both have lists for tuples.
    config = ConfigDict(json.loads(default.get_config().to_json_best_effort()))
    config.update(saved)
    return config


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
    except Exception as error:  # Orbax raises many kinds; each means that this can't be used
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"checkpoint {path} can't be read: {reason}") from error


def _existing(path: Path) -> Path:
    path = user_path(path).resolve()  # Orbax refuses relative paths
    if not path.is_dir():
        raise UserError(f"{path}: no checkpoint there")
    return path


def _verify(path: Path, items: Iterable[str]) -> None:
    """Compares the files of `items` with their sha256: Orbax would load a flipped bit as a weight.

    Checkpoints of older versions carry none, and are taken as they are.
    """
    if not (path / CHECKSUMS).is_file():
        return
    try:
        expected = dict(json.loads((path / CHECKSUMS).read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"checkpoint {path} is damaged: {CHECKSUMS} can't be read") from error
    # Whoever wants the configuration alone need not have the weights hashed.
    chosen = {name: value for name, value in expected.items() if name.split("/")[0] in items}
    # A list that names none of them would let everything pass.
    damaged = first_damaged(path, chosen) if chosen else path / CHECKSUMS
    if damaged:
        raise UserError(f"checkpoint {path} is damaged: {damaged} is not what was saved")


def check_fits(saved: dict, config: ConfigDict, path: Path) -> None:
    """Compares the configuration that a checkpoint was trained with to the one given.

    Another model, or other optimiser state, can't be loaded; other differences are logged.

    Raises:
        UserError: naming the fields that differ.
    """
    now = json.loads(config.to_json_best_effort())
    old, new = flatten(complete(saved)), flatten(ConfigDict(now))
    # Where processes meet may be elsewhere at every start.
    lasting = [name for name in new if not name.startswith("distributed.")]
    changed = [name for name in lasting if old[name] != new[name]]
    fatal = [name for name in changed if _decides_shapes(name, old, new)]
    if fatal:
        listed = ", ".join(f"{name} (saved {old[name]!r}, now {new[name]!r})" for name in fatal)
        raise UserError(f"checkpoint {path} was trained with another {listed}")
    for name in changed:
        LOG.warning("config.%s was %r in %s, is %r now", name, old[name], path, new[name])


def _decides_shapes(name: str, old: dict, new: dict) -> bool:
    # What counts of these is whether they are on: how large they are changes no array.
    off = {"ema_decay": 0, "optim.momentum": 0, "optim.clip_norm": 0, "optim.head_only_steps": 0}
    off |= {"optim.layer_decay": 1}
    if name in off:
        return (old[name] == off[name]) != (new[name] == off[name])
    # Padding and bn_epsilon change no shape either, but what the weights mean.
    free = {"dropout", "drop_path", "bn_momentum", "depthwise", "mbconv", "remat"}
    return name in {"optim.name", "optim.freeze"} or (
        name.startswith("model.") and name.removeprefix("model.") not in free
    )
