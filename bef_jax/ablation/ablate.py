"""--mode=ablate: trains every row of the paper's table with several seeds.

Each run is `--mode=train` in WORKDIR/<row>/seed<seed>, in a process of its own. So a run can be
stopped, killed or repeated like any other, and the same command trains what is missing.
"""

import json
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

from bef_jax.ablation import workers
from bef_jax.ablation.cost import estimate
from bef_jax.ablation.table import FILES, scored_block, tabulate, write_table
from bef_jax.ablation.workers import Slot
from bef_jax.config import flatten, validate
from bef_jax.configs.ablation import BASELINE, ROWS
from bef_jax.data.prepare import prepare_with_progress
from bef_jax.errors import RunError, UserError
from bef_jax.runtime import lock
from bef_jax.runtime.files import check_outputs, check_types, open_user_file, read_json
from bef_jax.runtime.interrupt import Interrupt
from bef_jax.training import outputs
from bef_jax.training.outputs import read_train_summary

LOG = logging.getLogger(__name__)
# The results of a run do not depend on these fields.
_DECIDE_NOTHING = (
    "ablation.", "benchmark.", "checkpoint.", "compile_cache", "distributed.", "log_every",
    "predict.",
)  # fmt: skip
_LOG, _LAST = "log.txt", 1 << 20  # a run's log; how many of its last bytes are read
_POLL_SECONDS = 0.2  # between two checks for a signal or an ended run


@dataclass(frozen=True)
class Run:
    """One training run of the table: a row with one seed.

    Attributes:
        config: the run's whole configuration.
        changes: fields that differ from the command's: {dotted name: value, as a flag takes it}.
    """

    row: str
    seed: int
    workdir: Path
    config: ConfigDict
    changes: dict

    def summary(self) -> dict | None:
        """Returns the summary of the run; None if the run has not finished."""
        found = read_train_summary(self.workdir)
        # A run that a signal stopped also leaves a summary, but one without results.
        return found if found and found["valid"] else None


def run_ablation(
    config: ConfigDict, workdir: Path, argv: Sequence[str], dry_run: bool = False
) -> dict:
    """Trains the missing runs, and writes the table (`table.FILES`) into `workdir`.

    Args:
        config: the configuration that the rows of configs/ablation.py change.
        argv: the command line's flags, after the program's name; each run gets them too.
        dry_run: trains nothing, and estimates what the missing runs would cost.

    Returns:
        The summary: mode, runs, finished, split, rows (`table.tabulate`) and files. For a dry run:
        mode, runs, finished, rows (`cost.estimate`) and seconds.

    Raises:
        UserError: a row is unknown, a run's configuration or data are invalid, or a file of an
            earlier run is damaged or in the way of an output.
        RunError: a run failed.
    """
    runs = plan_runs(config, workdir)
    # Check everything before the first run, so that an error costs no training time.
    check_outputs(workdir, FILES)
    for planned in runs:
        outputs.check(planned.workdir, also=[_LOG])
        _check_unchanged(planned)
        planned.summary()  # raises if the file is damaged
    if dry_run:
        # Prepare the store even so: only it knows how many patches are left without duplicates.
        n_train = prepare_with_progress(config.data)["counts"]["train"]
        return {"mode": "ablate", **estimate(runs, n_train)}
    with lock.held(workdir):
        prepare_with_progress(config.data)  # here, so that the runs do not all do it at once
        _train(runs, argv, workers.find(config.ablation.jobs))
        # Write the table after a signal too, from the runs that have finished.
        finished = [each for each in runs if each.summary()]
        summary = {"mode": "ablate", "runs": len(runs), "finished": len(finished)}
        if finished:
            table = tabulate(finished, config.eval.threshold)
            summary |= table | {"files": write_table(workdir, table, finished)}
    return summary


def plan_runs(config: ConfigDict, workdir: Path) -> list[Run]:
    """Returns the runs of the table, seed by seed, so that early results can be compared.

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
    return [_plan_run(config, workdir, row, seed) for seed in seeds for row in rows]


def _plan_run(config: ConfigDict, workdir: Path, row: str, seed: int) -> Run:
    changes = BASELINE | ROWS[row] | {"seed": seed, "name": f"{config.name}_{row}_{seed}"}
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    # Validate here, because the run's own process may start hours later.
    validate(changed)
    return Run(row, seed, workdir / row / f"seed{seed}", changed, changes)


def _check_unchanged(run: Run) -> None:
    """Raises `UserError` if the run was begun with other settings: a table must not mix them."""
    fix = f"move {run.workdir} away, and it is trained again"
    try:
        old = read_json(run.workdir / "config.json", _fields, fix)
    except FileNotFoundError:
        return
    # Pass the new one through JSON too, because JSON turns tuples into lists.
    old, new = _fields(old), _fields(json.loads(run.config.to_json_best_effort()))
    for name in new:
        decides = not name.startswith(_DECIDE_NOTHING)
        # A run of an older version may lack a field, which then can't be compared.
        if decides and name in old and old[name] != new[name]:
            raise UserError(
                f"{run.workdir} was begun with config.{name}={old[name]!r}, not {new[name]!r}: "
                "give another --workdir"
            )


def _fields(config: Any) -> dict[str, Any]:
    """Returns the fields of a configuration that was read from JSON, by their dotted names."""
    check_types(config)
    return flatten(ConfigDict(config))


# ---- training -----------------------------------------------------------------------------------


def _train(runs: list[Run], argv: Sequence[str], places: list[Slot]) -> None:
    """Trains the unfinished runs, one at a time in each place; a signal stops them all."""
    missing = [run for run in runs if not run.summary()]
    running: dict[Slot, tuple[Run, subprocess.Popen]] = {}
    ended, started = 0, time.monotonic()
    with Interrupt() as interrupt:
        try:
            while (missing or running) and not interrupt.requested:
                for place in [place for place in places if place not in running][: len(missing)]:
                    running[place] = _start(missing.pop(0), argv, place)
                time.sleep(_POLL_SECONDS)
                for run, summary in _take_ended(running):
                    ended += 1
                    # Wall time per ended run, so that it counts the places that work in parallel.
                    left = (time.monotonic() - started) / ended * (len(missing) + len(running))
                    _say(run, summary, left)
        finally:
            # Stop them also when one run failed: the others save, so that they can resume later.
            _stop([process for _, process in running.values()])


def _take_ended(
    running: dict[Slot, tuple[Run, subprocess.Popen]],
) -> Iterator[tuple[Run, dict]]:
    """Takes the runs that have ended out of `running`, and yields them with their summaries."""
    for place, (run, process) in list(running.items()):
        if process.poll() is not None:
            del running[place]
            yield run, _result(run, process.returncode)


def _start(run: Run, argv: Sequence[str], place: Slot) -> tuple[Run, subprocess.Popen]:
    """Starts the run's command; it logs to log.txt, because several runs would mix their lines."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    changes = [f"--config.{name}={value}" for name, value in run.changes.items()]
    # If a flag is given twice, the last one counts.
    flags = [*argv, *changes, "--mode=train", f"--workdir={run.workdir}"]
    LOG.info("%s, seed %d: training, with its log in %s", run.row, run.seed, _log(run))
    # Append, so that a resumed run keeps the log of its earlier starts.
    with open(_log(run), "a") as log:
        command = [sys.executable, "-m", "bef_jax.main", *flags]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=place.environment())
    place.pin(process.pid)
    return run, process


def _log(run: Run) -> Path:
    return run.workdir / _LOG


def _result(run: Run, status: int) -> dict:
    """Returns the summary of a run that has ended.

    Raises:
        UserError: the run ended with an error of the user's.
        RunError: the run failed, or somebody stopped it.
    """
    summary = run.summary()
    if status == 0 and summary:
        return summary
    # Take the last such line, because earlier starts may have logged others.
    lines = [line for line in _last_lines(_log(run)) if line.startswith("error: ")]
    if status == 2 and lines:
        raise UserError(f"{run.row}, seed {run.seed}: {lines[-1].removeprefix('error: ')}")
    raise RunError(
        f"{run.row}, seed {run.seed} ended with status {status}; {_log(run)} says why; the "
        "same command continues the ablation"
    )


def _last_lines(file: Path) -> list[str]:
    with open_user_file(file) as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST))
        return log.read().decode(errors="replace").splitlines()


def _stop(processes: list[subprocess.Popen]) -> None:
    """Stops the runs: each of them saves and ends."""
    for process in processes:
        # Send SIGTERM: a Ctrl-C in the terminal has already reached the runs, and a second SIGINT
        # would end them without a save.
        process.terminate()
    # Wait only after all were told, so that all of them save at the same time.
    for process in processes:
        process.wait()


def _say(run: Run, summary: dict, seconds_left: float) -> None:
    block = scored_block(summary)
    auc = "not defined" if block["auc"] is None else f"{block['auc']:.4f}"
    left = timedelta(seconds=round(seconds_left))
    LOG.info("%s, seed %d: %s AUC %s; about %s left", run.row, run.seed, block["split"], auc, left)
