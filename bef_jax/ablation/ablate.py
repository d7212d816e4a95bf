"""--mode=ablate: trains every row of the paper's table with several seeds.

A trial is a row with one seed: `--mode=train` in WORKDIR/<row>/seed<seed>, in a process of its own.
So it can be stopped, killed or repeated like any other run, and the same command trains what is
missing.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bef_jax.ablation.cost import estimate
from bef_jax.ablation.table import FILES, scored_block, tabulate, write_table
from bef_jax.ablation.workers import Worker, find_workers
from bef_jax.config import as_json, flatten, validate
from bef_jax.configs.ablation import ROWS
from bef_jax.configs.fields import ENVIRONMENT, FROM_STORE, affects
from bef_jax.data import store
from bef_jax.data.prepare import prepare_with_progress
from bef_jax.errors import RunError, UserError
from bef_jax.runtime import lock
from bef_jax.runtime.files import check_outputs, check_types, open_user_file, read_json
from bef_jax.runtime.interrupt import Interrupt
from bef_jax.training import outputs
from bef_jax.training.outputs import read_train_summary

LOG = logging.getLogger(__name__)
_LOG_FILE = "log.txt"
_LOG_TAIL_BYTES = 1 << 20  # how much of a log is read, from its end
_POLL_SECONDS = 0.2  # between two checks for a signal or an ended trial


@dataclass(frozen=True)
class Trial:
    """One training run of the table: a row with one seed.

    Attributes:
        config: the trial's whole configuration.
        changes: fields that the row and seed set: {dotted name: value, as a flag takes it}.
    """

    row: str
    seed: int
    workdir: Path
    config: ConfigDict
    changes: dict

    def summary(self) -> dict | None:
        """Returns the summary of the trial; None if it has not finished."""
        found = read_train_summary(self.workdir)
        # A trial that a signal stopped also leaves a summary, but one without results.
        return found if found and found["valid"] else None


def run_ablation(
    config: ConfigDict, workdir: Path, argv: Sequence[str], dry_run: bool = False
) -> dict:
    """Trains the missing trials, and writes the table (`table.FILES`) into `workdir`.

    Args:
        config: the configuration that the rows of configs/ablation.py change.
        argv: the command line's flags, after the program's name; each trial gets them too.
        dry_run: trains nothing, and estimates what the missing trials would cost.

    Returns:
        The summary: mode, runs (the number of trials), finished and, once a trial has finished,
        the fields of `table.tabulate` and files. For a dry run: mode, runs, finished, rows
        (`cost.estimate`) and seconds.

    Raises:
        UserError: a row is unknown, a trial's configuration or data are invalid, or a file of an
            earlier trial is damaged, of other settings or in the way of an output.
        RunError: a trial failed.
    """
    trials = plan_trials(config, workdir)
    # Check everything before the first trial, so that an error costs no training time.
    check_outputs(workdir, FILES)
    for trial in trials:
        outputs.check_writable(trial.workdir, also=[_LOG_FILE])
        check_unchanged(trial)
        trial.summary()  # raises if the file is damaged
    if dry_run:
        # Prepare the store even so: only it knows how many patches are left without duplicates.
        n_train = prepare_with_progress(config.data)["counts"]["train"]
        return {"mode": "ablate", **estimate(trials, n_train)}
    with lock.held(workdir):
        prepare_with_progress(config.data)  # here, so that the trials do not all do it at once
        _train(trials, argv, find_workers(config.ablation.jobs))
        # Write the table after a signal too, from the trials that have finished.
        finished = [trial for trial in trials if trial.summary()]
        summary = {"mode": "ablate", "runs": len(trials), "finished": len(finished)}
        if finished:
            split = scored_block(finished[0].summary())["split"]
            groups = store.open_split(store.store_path(config.data), split).groups
            table = tabulate(finished, config.eval.threshold, groups)
            summary |= table | {"files": write_table(workdir, table, finished)}
    return summary


def plan_trials(config: ConfigDict, workdir: Path) -> list[Trial]:
    """Returns the trials of the table, seed by seed, so that early results can be compared.

    Raises:
        UserError: a row is unknown, or its configuration is invalid.
    """
    rows = tuple(config.ablation.rows) or tuple(ROWS)
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise UserError(
            f"config.ablation.rows={rows}: {unknown[0]!r} is unknown: choose from {', '.join(ROWS)}"
        )
    seeds = range(config.seed, config.seed + config.ablation.seeds)
    return [_plan_trial(config, workdir, row, seed) for seed in seeds for row in rows]


def _plan_trial(config: ConfigDict, workdir: Path, row: str, seed: int) -> Trial:
    changes = ROWS[row] | {"seed": seed, "name": f"{config.name}_{row}_{seed}"}
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    # Validate here, because the trial's own process may start hours later.
    validate(changed)
    return Trial(row, seed, workdir / row / f"seed{seed}", changed, changes)


def check_unchanged(trial: Trial) -> None:
    """Raises `UserError` if the trial was begun with other settings: a table must not mix them."""
    fix = f"move {trial.workdir} away, and it is trained again"
    try:
        old = read_json(trial.workdir / "config.json", _fields, fix)
    except FileNotFoundError:
        return
    # Pass the new one through JSON too, because JSON turns tuples into lists.
    old, new = _fields(old), _fields(as_json(trial.config))
    for name in new:
        if name in FROM_STORE and not new[name]:
            continue
        # A trial of an older version may lack a field, which then can't be compared.
        differs = name in old and old[name] != new[name]
        if differs and affects(name) != ENVIRONMENT:
            raise UserError(
                f"{trial.workdir} was begun with config.{name}={old[name]!r}, not {new[name]!r}: "
                "give another --workdir"
            )


def _fields(config: Any) -> dict[str, Any]:
    """Returns the fields of a configuration that was read from JSON, by their dotted names."""
    check_types(config)
    return flatten(ConfigDict(config))


# ---- training -----------------------------------------------------------------------------------


def _train(trials: list[Trial], argv: Sequence[str], workers: list[Worker]) -> None:
    """Trains the unfinished trials, one at a time on each worker; a signal stops them all."""
    missing = [trial for trial in trials if not trial.summary()]
    running: dict[Worker, tuple[Trial, subprocess.Popen]] = {}
    ended, started = 0, time.monotonic()
    with Interrupt() as interrupt:
        try:
            while (missing or running) and not interrupt.requested:
                idle = [worker for worker in workers if worker not in running]
                for worker in idle[: len(missing)]:
                    running[worker] = _start(missing.pop(0), argv, worker)
                time.sleep(_POLL_SECONDS)
                for trial, summary in _take_ended(running):
                    ended += 1
                    # By wall time per ended trial, because the workers train at the same time.
                    left = (time.monotonic() - started) / ended * (len(missing) + len(running))
                    _log_progress(trial, summary, left)
        finally:
            # Stop them also when one trial failed: the others save, so that they can resume later.
            _stop([process for _, process in running.values()])


def _take_ended(
    running: dict[Worker, tuple[Trial, subprocess.Popen]],
) -> Iterator[tuple[Trial, dict]]:
    """Takes the trials that have ended out of `running`, and yields them with their summaries."""
    for worker, (trial, process) in list(running.items()):
        if process.poll() is not None:
            del running[worker]
            yield trial, _result(trial, process.returncode)


def _start(trial: Trial, argv: Sequence[str], worker: Worker) -> tuple[Trial, subprocess.Popen]:
    """Starts the trial's command; it logs to a file, because several would mix their lines."""
    trial.workdir.mkdir(parents=True, exist_ok=True)
    changes = [f"--config.{name}={value}" for name, value in trial.changes.items()]
    # If a flag is given twice, the last one counts.
    flags = [*argv, *changes, "--mode=train", f"--workdir={trial.workdir}"]
    file = _log_file(trial)
    LOG.info("%s, seed %d: training, with its log in %s", trial.row, trial.seed, file)
    # Append, so that a resumed trial keeps the log of its earlier starts.
    with open(file, "a") as log:
        command = [sys.executable, "-m", "bef_jax.main", *flags]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=worker.environment())
    worker.pin(process.pid)
    return trial, process


def _log_file(trial: Trial) -> Path:
    return trial.workdir / _LOG_FILE


def _result(trial: Trial, status: int) -> dict:
    """Returns the summary of a trial that has ended.

    Raises:
        UserError: the trial ended with an error of the user's.
        RunError: the trial failed, or somebody stopped it.
    """
    summary = trial.summary()
    if status == 0 and summary:
        return summary
    file = _log_file(trial)
    # Take the last such line, because earlier starts may have logged others.
    lines = [line for line in _last_lines(file) if line.startswith("error: ")]
    if status == 2 and lines:
        raise UserError(f"{trial.row}, seed {trial.seed}: {lines[-1].removeprefix('error: ')}")
    raise RunError(
        f"{trial.row}, seed {trial.seed} ended with status {status}; {file} says why; the "
        "same command continues the ablation"
    )


def _last_lines(file: Path) -> list[str]:
    with open_user_file(file) as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        return log.read().decode(errors="replace").splitlines()


def _stop(processes: list[subprocess.Popen]) -> None:
    """Stops the trials: each of them saves and ends."""
    for process in processes:
        # Send SIGTERM: a Ctrl-C in the terminal has already reached the trials, and a second SIGINT
        # would end them without a save.
        process.terminate()
    # Wait only after all were told, so that all of them save at the same time.
    for process in processes:
        process.wait()


def _log_progress(trial: Trial, summary: dict, seconds_left: float) -> None:
    block = scored_block(summary)
    auc = "not defined" if block["auc"] is None else f"{block['auc']:.4f}"
    left = timedelta(seconds=round(seconds_left))
    name = f"{trial.row}, seed {trial.seed}"
    LOG.info("%s: %s AUC %s; about %s left", name, block["split"], auc, left)
