"""--mode=train: trains to the end, or resumes what is in the workdir."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from bef_jax.config import as_json, check_devices, validate
from bef_jax.data import batches, store
from bef_jax.data.batches import Batch
from bef_jax.data.splits import open_splits
from bef_jax.data.store import Split
from bef_jax.errors import DivergedError, RunError, UserError
from bef_jax.runtime import distributed, lock, sharding
from bef_jax.runtime.files import user_path
from bef_jax.runtime.interrupt import Interrupt
from bef_jax.runtime.progress import Progress
from bef_jax.scoring.calibration import choose_operating_point
from bef_jax.scoring.evaluator import make_evaluator, summarise
from bef_jax.scoring.metrics import Evaluation
from bef_jax.scoring.probabilities_csv import write_probabilities
from bef_jax.training import checkpoint, outputs, pretrained
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.clock import Clock, Laps
from bef_jax.training.history import History
from bef_jax.training.optim import learning_rates, make_schedule
from bef_jax.training.packing import Packing, make_packing
from bef_jax.training.state import (
    TrainState,
    abstract_state,
    count_params,
    create_state,
    params_digest,
)
from bef_jax.training.step import class_weights, compile_step, describe
from bef_jax.training.step_counts import StepCounts, call_sizes, check_placement, count_steps
from bef_jax.training.steplog import StepLog

LOG = logging.getLogger(__name__)


def train_and_evaluate(
    config: ConfigDict, workdir: Path | str, started: float | None = None
) -> dict:
    """Trains to the end, evaluates, and writes checkpoints and the report.

    If the workdir holds checkpoints, the run resumes. If the run is finished, its summary is
    returned again.

    Args:
        config: as `configs.default.get_config` makes it.
        workdir: the run writes everything here, except the store.
        started: when the program began, by time.perf_counter; for the log's time to the first step.

    Returns:
        The summary; its keys are stable.

    Raises:
        UserError: the configuration, the data or a checkpoint is not valid.
        DivergedError: the loss or a log-odds is not finite.
    """
    laps = Laps(started)
    laps.mark("imports")
    workdir = user_path(workdir).resolve()
    validate(config)
    with lock.held(workdir):
        return _train_and_evaluate(config, workdir, laps)


@dataclasses.dataclass(frozen=True)
class Run:
    """What the functions of a run share. The training state is passed separately."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    splits: dict[str, Split]
    manifest: dict  # of the store
    counts: StepCounts
    packing: Packing  # of the state in the loop
    evaluate: Callable[[dict, Split], Evaluation]
    checkpoints: Checkpoints
    history: History
    clock: Clock  # seconds per activity, over all restarts
    laps: Laps  # how the time to the first step divides


def _train_and_evaluate(config: ConfigDict, workdir: Path, laps: Laps) -> dict:
    # ---- Check everything that can be checked before the data are read. ----
    if distributed.is_first():
        outputs.check_writable(workdir)
    mesh = sharding.make_mesh()
    check_devices(config, mesh)
    if config.init_from and not checkpoint.saved_steps(workdir):
        pretrained.find(config.init_from)  # now, because reading a data set can take an hour

    # ---- Open the data. ----
    config, splits = open_splits(config)
    check_placement(config, batches.should_place(splits["train"], config.data.placement))
    counts = count_steps(config, len(splits["train"]))
    if done := _finished_summary(config, workdir, counts.steps):
        LOG.info("%s is done at step %d; this is its summary", workdir, counts.steps)
        return done
    laps.mark("data")
    workdir.mkdir(parents=True, exist_ok=True)
    run = Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        splits=splits,
        manifest=store.read_manifest(store.store_path(config.data)),
        counts=counts,
        packing=make_packing(config, mesh),
        evaluate=make_evaluator(config, mesh),
        checkpoints=Checkpoints(workdir, config.checkpoint.keep),
        history=History(workdir),
        clock=Clock(),
        laps=laps,
    )

    # ---- Train, evaluate the best checkpoint, and report. ----
    try:
        state = _train(run)
        run.checkpoints.wait()  # the best is read from disk
        summary = _summary(run, state)
        if summary["step"] >= counts.steps:  # a signal may have stopped the run before its end
            _evaluate_best(run, summary)
        return summary
    except DivergedError as error:
        run.checkpoints.wait()  # a save may still be under way
        good = run.checkpoints.newest(at_most=error.last_good) or "none"
        text = f"{error}; last good checkpoint: {good}"
        raise DivergedError(text, error.last_good) from error
    finally:
        run.checkpoints.close()
        run.history.close()


def _finished_summary(config: ConfigDict, workdir: Path, steps: int) -> dict | None:
    """Returns the summary of a run that has already reached `steps`; otherwise None."""
    summary = outputs.read_train_summary(workdir)
    # A summary without an evaluation is from a run that was stopped early. So is one of a lower
    # step, unless the user has since raised the number of steps.
    if summary is None or summary["step"] < steps or summary["valid"] is None:
        return None
    newest = workdir / "checkpoints" / str(summary["step"])
    checkpoint.check_fits(checkpoint.read_metadata(newest)["config"], config, newest)
    return summary


# ---- training -----------------------------------------------------------------------------------


def _train(run: Run) -> TrainState:
    """Trains and returns the last state; a signal may have stopped the run before its end."""
    config, train = run.config, run.splits["train"]
    with Interrupt() as interrupt:  # from here on, a signal ends the run after a save
        state = _initial_state(run)
        first = int(state.step)
        run.history.truncate(first)  # a kill may have left lines of later steps
        outputs.write_config(run.workdir, config)
        run.laps.mark("state")
        places = batches.should_place(train, config.data.placement)
        placed = batches.place_split(train, run.mesh) if places else None
        with run.clock.measure("compile"):
            inputs, programs = _inputs(run, placed, first), _compile(run, state, placed)
        run.laps.mark("compile")
        distributed.wait_for_all("compiled")  # compile times differ, and Gloo waits for 30 s only

        state = run.packing.pack(state)
        console = Console(stderr=True, quiet=not distributed.is_first())
        with Progress(run.counts.steps, first, console) as bar, run.clock.measure("loop"):
            return _loop(run, programs, inputs, state, bar, interrupt)


def _initial_state(run: Run) -> TrainState:
    """Returns the state to go on from. The first case that applies decides.

    1. The workdir has checkpoints: the newest. If it cannot be read, that is an error that names
       it and an older one, because a fresh start would silently throw the run away.
       config.init_from is ignored: its weights were where the run began.
    2. config.init_from is set: its parameters and batch statistics, at step 0. If they are
       missing, that is an error.
    3. Otherwise: a fresh state from config.seed.
    """
    everywhere = sharding.replicated(run.mesh)
    if newest := run.checkpoints.newest():
        return _resume(run, newest)
    if run.config.init_from:
        return pretrained.start(run.config, everywhere)[0]
    return create_state(run.config, everywhere)


def _resume(run: Run, newest: Path) -> TrainState:
    try:
        saved = checkpoint.read_metadata(newest)
        # Restore in the shapes of the checkpoint's own config, so that check_fits, and not Orbax,
        # reports a field that differs.
        abstract = abstract_state(checkpoint.read_config(newest))
        state = checkpoint.restore(newest, abstract, sharding.replicated(run.mesh))
    except UserError as error:
        older = run.checkpoints.newest(at_most=int(newest.name) - 1)
        fix = f"; to go on from {older.name}, move it away" if older else ""
        raise UserError(f"{error}{fix}") from error
    checkpoint.check_fits(saved["config"], run.config, newest)
    # Imported checkpoints lack `content`; older ones may lack `content` and `clock`.
    content = run.manifest["content"]["total"]
    if saved.get("content", content) != content:
        LOG.warning("the store holds other patches than when %s was saved", newest)
    run.clock.restore(saved.get("clock", {}))
    LOG.info("resuming %s at step %d", run.workdir, int(state.step))
    return state


def _compile(run: Run, state: TrainState, placed: Batch | None) -> dict[int, Callable]:
    """Returns the programs for the remaining calls, by how many steps each takes.

    A call runs one compiled program, which takes one or more steps.
    """
    config, counts = run.config, run.counts
    shapes = run.packing.shapes(state)
    programs = {
        size: compile_step(config, run.mesh, shapes, placed, size)
        for size in set(call_sizes(config, counts, int(state.step)))
    }
    if programs:  # there are none if only the report of a run was missing
        describe(config, state, programs[max(programs)])
    return programs


def _inputs(run: Run, placed: Batch | None, first: int) -> Iterator[tuple]:
    """Returns for each call from step `first` on its number of steps, and its arguments.

    Besides the state, these are its `Batch` or `Selection`, the key, rates and class weights.
    """
    config, counts, split = run.config, run.counts, run.splits["train"]
    sizes = functools.partial(call_sizes, config, counts, first)
    rows_of = batches.make_order(config, split.labels)
    if placed is None:
        chosen = batches.host_batches(split, run.mesh, rows_of, first)
    else:
        chosen = batches.selections(placed, run.mesh, rows_of, first, sizes())
    key = jax.random.key(config.seed)  # each step folds its number in
    schedule = make_schedule(config, counts.steps, counts.steps_per_epoch)
    rates = learning_rates(schedule, first, sizes())
    weights = class_weights(config, split.labels)  # put on the devices, unless there are none
    weights = jax.tree.map(lambda x: sharding.put_everywhere(x, run.mesh), weights)
    return zip(sizes(), chosen, itertools.repeat(key), rates, itertools.repeat(weights))


def _loop(
    run: Run,
    programs: dict[int, Callable],
    inputs: Iterator[tuple],
    state: TrainState,
    bar: Progress,
    interrupt: Interrupt,
) -> TrainState:
    """Runs the loop in this order: log, evaluate, save; then the next batch, and the step.

    The order must not change: a state is saved after the losses up to it were found finite, and a
    run that is stopped ends after its save.
    """
    config, counts, train = run.config, run.counts, run.splits["train"]
    first = step = int(state.step)
    log = StepLog(config, counts, train, run.history, run.clock, bar)
    while True:
        last = step >= counts.steps
        ended = last or interrupt.should_stop_at(step)
        evaluates = step > first and (last or step % counts.steps_per_eval == 0)
        saves = ended or evaluates or (step > first and step % config.checkpoint.every_steps == 0)
        log.flush(everything=saves)  # raises before a save if a loss is not finite
        if saves:  # an evaluation and the end always save
            with run.clock.measure("save"):
                whole = run.packing.unpack(state)
            valid = _evaluate(run, whole, step, bar) if evaluates else None
            _save(run, whole, step, valid)
            if ended:
                return whole
            del whole  # the next call needs the memory
        with run.clock.measure("wait"):  # of the host: the devices may still compute
            call_steps, *arguments = next(inputs)
        state, metrics = programs[call_steps](state, *arguments)
        if step == first:
            jax.block_until_ready(metrics)  # only once; `log.flush` fetches a call later
            run.laps.mark("step")
            bar.log(f"first step {run.laps}")
        step += call_steps
        log.add(step, metrics)


def _evaluate(run: Run, state: TrainState, step: int, bar: Progress) -> Evaluation:
    """Evaluates on valid, and logs the metrics."""
    with run.clock.measure("evaluate"):
        evaluation = _evaluate_split(run, state.eval_variables(), "valid", step)
    metrics = evaluation.metrics
    figures = {f"valid_{name}": metrics[name] for name in ("loss", "auc", "accuracy")}
    # A valid split of one class has no AUC; its loss and accuracy still say something.
    figures = {name: value for name, value in figures.items() if value is not None}
    epoch = step / run.counts.steps_per_epoch
    run.history.write(step, epoch=epoch, **figures)
    bar.update(step, **figures)
    bar.log(f"epoch {epoch:.2f}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    return evaluation


def _evaluate_split(run: Run, variables: dict, split: str, step: int) -> Evaluation:
    """Evaluates the variables of `step` on a split.

    Raises:
        DivergedError: a log-odds is not finite.
    """
    try:
        return run.evaluate(variables, run.splits[split])
    except RunError as error:
        # The finite loss of `step` was computed with the state of step - 1, before its update.
        raise DivergedError(f"step {step}: {error}", last_good=step - 1) from error


def _save(run: Run, state: TrainState, step: int, valid: Evaluation | None) -> None:
    """Saves the state; after an evaluation also its AUC, temperature and threshold."""
    with run.clock.measure("save"):
        metadata = {
            "config": as_json(run.config),
            "clock": run.clock.snapshot(),
            "content": run.manifest["content"]["total"],  # sha256 of the patches and labels
        }
        if valid:
            metadata["operating_point"] = choose_operating_point(valid)
        run.checkpoints.save(step, state, metadata, valid and valid.metrics["auc"])


# ---- after the last step ------------------------------------------------------------------------


def _summary(run: Run, state: TrainState) -> dict:
    """Returns the summary without its evaluations."""
    clock, step = run.clock, int(state.step)
    trained = max(clock.training_seconds(), 1e-9)  # a divisor; a signal may come at once
    return {
        "mode": "train",
        "step": step,
        "epoch": step / run.counts.steps_per_epoch,
        "wall_seconds": clock.seconds("wall"),
        "compile_seconds": clock.seconds("compile"),
        "images_per_second": step * run.config.batch_size / trained,
        "input_wait_fraction": min(clock.seconds("wait") / trained, 1.0),
        "params": count_params(state.params),
        "params_digest": params_digest(state.params, state.batch_stats),
        "best_step": None,  # keys are stable, so a run that was stopped has them, too
        "valid": None,
        "test": None,
    }


def _evaluate_best(run: Run, summary: dict) -> None:
    """Evaluates the best checkpoint, adds its figures to the summary, and writes the report."""
    # Load it even if the last state is the best, so that the figures are of the file itself.
    path = checkpoint.best(run.workdir)  # by valid AUC
    step, everywhere = int(path.name), sharding.replicated(run.mesh)
    variables = checkpoint.restore_variables(path, run.config, everywhere)
    evaluations = {
        name: _evaluate_split(run, variables, name, step)
        for name in ("valid", "test")
        if name in run.splits
    }
    summary["best_step"] = step
    for name, evaluation in evaluations.items():
        summary[name] = summarise(evaluation, run.config, evaluations["valid"])
    if distributed.is_first():  # all processes have the figures, one writes them
        _report(run, variables, summary, evaluations)


def _report(run: Run, variables: dict, summary: dict, evaluations: dict[str, Evaluation]) -> None:
    # Imported here, because matplotlib and scikit-learn take 0.5 s that the first step need not
    # wait for.
    from bef_jax.report import report_run

    page = report_run(
        workdir=run.workdir,
        config=run.config,
        splits=run.splits,
        manifest=run.manifest,
        history=run.history.lines,
        evaluations=evaluations,
        variables=variables,
        summary=summary,
    )
    LOG.info("open %s in a browser: metrics, curves, the most confident patches, the data", page)
    for name, evaluation in evaluations.items():
        write_probabilities(run.workdir / f"scores_{name}.csv", evaluation)
    outputs.write_summary(run.workdir, summary)  # for callers from Python; main does so, too
