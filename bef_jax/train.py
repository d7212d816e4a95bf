"""--mode=train: train to the end, or go on with what is in the workdir."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from bef_jax.config import check_devices, validate
from bef_jax.data import store
from bef_jax.data.batches import (
    Batch,
    Selection,
    host_batches,
    is_placed,
    place_split,
    selections,
)
from bef_jax.data.splits import open_splits
from bef_jax.data.store import Split
from bef_jax.errors import DivergedError, RunError, UserError
from bef_jax.evaluate import make_evaluator, summarise
from bef_jax.runtime import distributed, lock, sharding
from bef_jax.runtime.files import user_path, write_text
from bef_jax.runtime.interrupt import Interrupt
from bef_jax.runtime.progress import Progress
from bef_jax.scoring.calibration import choose_operating_point
from bef_jax.scoring.metrics import Evaluation
from bef_jax.scoring.scores_csv import write_scores
from bef_jax.training import checkpoint, outputs, pretrained
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.clock import Clock, Laps
from bef_jax.training.durations import Durations, call_sizes, check_placement, durations
from bef_jax.training.history import History
from bef_jax.training.optim import make_schedule
from bef_jax.training.outputs import read_train_summary, write_summary
from bef_jax.training.state import (
    TrainState,
    abstract_state,
    count_params,
    create_state,
    params_digest,
)
from bef_jax.training.step import compile_step, describe
from bef_jax.training.steplog import StepLog

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    splits: dict[str, Split]
    manifest: dict  # the store's
    durations: Durations
    schedule: Callable
    evaluate: Callable
    checkpoints: Checkpoints
    history: History
    clock: Clock
    laps: Laps

    @property
    def content(self) -> str:
        """The sha256 over the store's patches and labels, whatever their order."""
        return self.manifest["content"]["total"]


def train_and_evaluate(
    config: ConfigDict, workdir: Path | str, started: float | None = None
) -> dict:
    """Trains to the end, evaluates, and writes checkpoints and the report.

    A workdir that holds checkpoints is resumed; one that is done returns its summary again.

    Args:
        config: as `configs.default.get_config` makes it.
        workdir: everything that the run writes goes here, besides the store.
        started: when the program began, by time.perf_counter; the log counts from there.

    Returns:
        The summary; its keys are stable.

    Raises:
        UserError: the configuration, data or checkpoints are not as they must be.
        DivergedError: the loss or a score is not finite.
    """
    laps = Laps(started)
    laps.mark("imports")
    workdir = user_path(workdir).resolve()
    validate(config)
    with lock.held(workdir):
        if distributed.is_first():
            outputs.check(workdir)
        return _train_and_evaluate(config, workdir, laps)


def _train_and_evaluate(config: ConfigDict, workdir: Path, laps: Laps) -> dict:
    mesh = sharding.make_mesh()
    check_devices(config, mesh)  # before data are read
    if config.init_from and not checkpoint.saved_steps(workdir):
        pretrained.find(config.init_from)  # now: reading a data set can take an hour
    splits = open_splits(config.data)
    check_placement(config, is_placed(splits["train"], config.data.placement))
    spans = durations(config, len(splits["train"]))
    done = _finished_summary(config, workdir, spans.steps)
    if done:
        LOG.info("%s is done at step %d; this is its summary", workdir, spans.steps)
        return done
    laps.mark("data")
    run = _begin(config, workdir, mesh, splits, spans, laps)
    try:
        return _finish(run, _train(run))
    except DivergedError as error:
        run.checkpoints.wait()  # a save may still be under way
        good = run.checkpoints.newest(at_most=error.last_good) or "none"
        text = f"{error}; last good checkpoint: {good}"
        raise DivergedError(text, error.last_good) from error
    finally:
        run.checkpoints.close()
        run.history.close()


# ---- before the first step ----------------------------------------------------------------------


def _finished_summary(config: ConfigDict, workdir: Path, steps: int) -> dict | None:
    """The summary of a run that has already come to `steps`."""
    summary = read_train_summary(workdir)
    # Without figures it was stopped; with fewer steps it is meant to be longer now.
    if summary is None or summary["step"] < steps or summary["valid"] is None:
        return None
    newest = workdir / "checkpoints" / str(summary["step"])
    checkpoint.check_fits(checkpoint.read_run(newest)["config"], config, newest)
    return summary


def _begin(
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh,
    splits: dict[str, Split],
    spans: Durations,
    laps: Laps,
) -> Run:
    workdir.mkdir(parents=True, exist_ok=True)
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        splits=splits,
        manifest=store.read_manifest(store.store_path(config.data)),
        durations=spans,
        schedule=make_schedule(config, spans.steps, spans.steps_per_epoch),
        evaluate=make_evaluator(config, mesh),
        checkpoints=Checkpoints(workdir, config.checkpoint.keep),
        history=History(workdir),
        clock=Clock(),
        laps=laps,
    )


def _initial_state(run: Run) -> TrainState:
    """Returns the state to go on from, in this order.

    1. The workdir has checkpoints: the newest. If it can't be read, that is an error that names
       it and an older one; starting afresh would throw the run away in silence.
       config.init_from is not looked at: its weights were where the run began.
    2. config.init_from: its parameters and batch statistics, at step 0. If missing, an error.
    3. Fresh, from config.seed.
    """
    config, everywhere = run.config, sharding.replicated(run.mesh)
    newest = run.checkpoints.newest()
    if newest:
        return _resume(run, newest)
    if config.init_from:
        return pretrained.start(config, everywhere)[0]
    return create_state(config, everywhere)


def _resume(run: Run, newest: Path) -> TrainState:
    try:
        saved = checkpoint.read_run(newest)
        # In its own shapes: what differs is then named by its field, not as Orbax's arrays.
        abstract = abstract_state(checkpoint.read_config(newest))
        state = checkpoint.restore(newest, abstract, sharding.replicated(run.mesh))
    except UserError as error:
        older = run.checkpoints.newest(at_most=int(newest.name) - 1)
        fix = f"; to go on from {older.name}, move it away" if older else ""
        raise UserError(f"{error}{fix}") from error
    checkpoint.check_fits(saved["config"], run.config, newest)
    if saved.get("content", run.content) != run.content:  # older and imported ones do not say
        LOG.warning("the store holds other patches than when %s was saved", newest)
    run.clock.restore(saved.get("clock", {}))  # older ones have none
    LOG.info("resuming %s at step %d", run.workdir, int(state.step))
    return state


# ---- the loop -----------------------------------------------------------------------------------


def _train(run: Run) -> TrainState:
    """Returns the last state; a signal may have stopped the run before its end."""
    with Interrupt() as interrupt:  # from here on: a signal while compiling saves, too
        state = _initial_state(run)
        run.history.truncate(int(state.step))  # what a kill left of later steps
        _write_config(run)
        run.laps.mark("state")
        first, placed = int(state.step), _placed(run)
        with run.clock.measure("compile"):
            programs = _compile(run, state, placed)
        run.laps.mark("compile")
        distributed.wait_for_all("compiled")  # a collective gives up after 30 s, by Gloo's limit
        inputs = _inputs(run, placed, first)
        with _progress(run, first) as bar, run.clock.measure("loop"):
            return _loop(run, programs, inputs, state, bar, interrupt)


def _progress(run: Run, first: int) -> Progress:
    console = Console(stderr=True, quiet=not distributed.is_first())
    return Progress(run.durations.steps, first, console)


def _write_config(run: Run) -> None:
    """Writes config.json once; that all processes see it shows that they share the workdir."""
    file = run.workdir / "config.json"
    with distributed.first_alone("config.json"):
        if distributed.is_first():
            write_text(file, run.config.to_json_best_effort(indent=2) + "\n")
        elif not file.exists():
            raise UserError(f"{run.workdir}: not shared by all hosts, and --workdir must be")


def _placed(run: Run) -> Batch | None:
    """The training split on the devices, if it is to be there."""
    split = run.splits["train"]
    return place_split(split, run.mesh) if is_placed(split, run.config.data.placement) else None


def _compile(run: Run, state: TrainState, placed: Batch | None) -> dict[int, Callable]:
    """The programs that the calls to come need, by how many steps they take."""
    config = run.config
    sizes = set(call_sizes(config, run.durations, int(state.step)))
    programs = {
        size: compile_step(config, run.schedule, run.mesh, state, placed, size) for size in sizes
    }
    if programs:  # none where only the report of a run was missing
        describe(config, state, programs[max(programs)])
    return programs


def _inputs(run: Run, placed: Batch | None, first: int) -> Iterator[Batch | Selection]:
    """What each call from step `first` on trains on."""
    config, split = run.config, run.splits["train"]
    order = {"seed": config.seed, "batch_size": config.batch_size, "start": first}
    if placed is None:
        return host_batches(split, run.mesh, **order)
    sizes = call_sizes(config, run.durations, first)
    return selections(split, placed, run.mesh, **order, sizes=sizes)


def _loop(
    run: Run,
    programs: dict[int, Callable],
    inputs: Iterator[Batch | Selection],
    state: TrainState,
    bar: Progress,
    interrupt: Interrupt,
) -> TrainState:
    """The order is law: log, evaluate, save; then the next batch, and the step, or several.

    So what is saved decides the next batch, and has been found finite.
    """
    config, spans, train = run.config, run.durations, run.splits["train"]
    first = step = int(state.step)
    key = jax.random.key(config.seed)  # each step folds its number in
    log = StepLog(config, spans, train, run.history, run.clock, bar)
    while True:
        last = step >= spans.steps
        ended = last or interrupt.stops_at(step)
        evaluates = step > first and (last or step % spans.eval_steps == 0)
        saves = ended or evaluates or (step > first and step % config.checkpoint.every_steps == 0)
        log.flush(everything=saves)  # a save waits for all, and holds none that is not finite
        valid = _evaluate(run, state, step, bar) if evaluates else None
        if saves:
            _save(run, state, step, valid)
        if ended:
            return state
        with run.clock.measure("wait"):  # what the step before did not hide
            batch = next(inputs)
        state, metrics = programs[batch.steps](state, batch, key)
        if step == first:
            _report_start(run, metrics, bar)
        step += batch.steps
        log.add(step, metrics)


def _report_start(run: Run, metrics: dict, bar: Progress) -> None:
    jax.block_until_ready(metrics)  # this once: later ones are read a step late
    run.laps.mark("step")
    bar.log(f"first step {run.laps}")


def _evaluate(run: Run, state: TrainState, step: int, bar: Progress) -> Evaluation:
    """Evaluates on valid, and logs the metrics."""
    with run.clock.measure("evaluate"):
        evaluation = _scores(run, state.eval_variables(), "valid", step)
    metrics = evaluation.metrics
    figures = {f"valid_{name}": metrics[name] for name in ("loss", "auc", "accuracy")}
    # A valid split of one class has no AUC; its loss and accuracy still say something.
    figures = {name: value for name, value in figures.items() if value is not None}
    epoch = step / run.durations.steps_per_epoch
    run.history.write(step, epoch=epoch, **figures)
    bar.update(step, **figures)
    bar.log(f"epoch {epoch:.2f}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    return evaluation


def _scores(run: Run, variables: dict, split: str, step: int) -> Evaluation:
    """Evaluates the variables of `step` on a split.

    Raises:
        DivergedError: a score is not finite.
    """
    try:
        return run.evaluate(variables, run.splits[split])
    except RunError as error:
        # The loss of this step, which was finite, is that of the state before.
        raise DivergedError(f"step {step}: {error}", last_good=step - 1) from error


def _save(run: Run, state: TrainState, step: int, valid: Evaluation | None) -> None:
    """Saves the state; where it was evaluated, with its AUC and what was chosen on valid."""
    with run.clock.measure("save"):
        config = json.loads(run.config.to_json_best_effort())
        counted = {"config": config, "clock": run.clock.snapshot(), "content": run.content}
        if valid:
            counted["operating_point"] = choose_operating_point(valid)
        run.checkpoints.save(step, state, counted, valid and valid.metrics["auc"])


# ---- after the last step ------------------------------------------------------------------------


def _finish(run: Run, state: TrainState) -> dict:
    """Evaluates the best checkpoint and writes the report, unless the run was interrupted."""
    run.checkpoints.wait()  # the best is read from disk
    summary = _summary(run, state)
    if summary["step"] >= run.durations.steps:
        # From disk also where the state at hand is the best: figures are of what others will load.
        path = checkpoint.best(run.workdir)
        variables = checkpoint.restore_variables(path, run.config, sharding.replicated(run.mesh))
        evaluations = _evaluate_best(run, variables, int(path.name))
        valid = evaluations["valid"]
        blocks = {name: summarise(seen, run.config, valid) for name, seen in evaluations.items()}
        summary |= {"best_step": int(path.name), **blocks}
        if distributed.is_first():  # all have the figures, one writes
            _report(run, variables, summary, evaluations)
    return summary


def _report(run: Run, variables: dict, summary: dict, evaluations: dict[str, Evaluation]) -> None:
    # Here, since matplotlib and scikit-learn take 0.5 s that the first step need not wait for.
    from bef_jax.report.gather import report_run

    found = run.history.lines, evaluations, variables, summary
    page = report_run(run.workdir, run.config, run.splits, run.manifest, *found)
    LOG.info("open %s in a browser: figures, curves, the surest patches, the data", page)
    for name, seen in evaluations.items():
        write_scores(run.workdir / f"scores_{name}.csv", seen)
    write_summary(run.workdir, summary)  # here, too, for who calls from Python


def _summary(run: Run, state: TrainState) -> dict:
    """The summary without its evaluations."""
    clock, step = run.clock, int(state.step)
    trained = max(clock.training_seconds(), 1e-9)  # a signal before the first step leaves none
    return {
        "mode": "train",
        "step": step,
        "epoch": step / run.durations.steps_per_epoch,
        "wall_seconds": clock.seconds("wall"),
        "compile_seconds": clock.seconds("compile"),
        "images_per_second": step * run.config.batch_size / trained,
        "input_wait_fraction": min(clock.seconds("wait") / trained, 1.0),
        "params": count_params(state.params),
        "params_digest": params_digest(state.params, state.batch_stats),
        "best_step": None,  # keys are stable: a run that was stopped has them, too
        "valid": None,
        "test": None,
    }


def _evaluate_best(run: Run, variables: dict, step: int) -> dict[str, Evaluation]:
    names = [name for name in ("valid", "test") if name in run.splits]
    return {name: _scores(run, variables, name, step) for name in names}
