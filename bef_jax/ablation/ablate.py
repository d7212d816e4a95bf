"""--mode=ablate: the paper's table. Every row is trained with several seeds, each run by itself.

A run is `--mode=train` in WORKDIR/<row>/seed<seed>, in a process of its own, so it may be stopped,
killed or repeated like any other. The same command goes on with what is missing.
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
# Fields that change no figure of a run.
_DECIDE_NOTHING = (
    "ablation.", "benchmark.", "checkpoint.", "compile_cache", "distributed.", "log_every",
    "predict.",
)  # fmt: skip
_LOG, _LAST = "log.txt", 1 << 20  # of a run in its workdir; bytes of it that are read
_POLL_SECONDS = 0.2  # between two looks at whether a signal came


@dataclass(frozen=True)
class Run:
    """One cell of the table before it is averaged: a row with a seed.

    Attributes:
        config: what it trains.
        changes: its fields that differ from the command's, as flags of the command line take them.
    """

    row: str
    seed: int
    workdir: Path
    config: ConfigDict
    changes: dict

    def summary(self) -> dict | None:
        """What the run ended with; None where it has not come to its end."""
        found = read_train_summary(self.workdir)
        # A run that a signal stopped leaves its summary too, without figures.
        return found if found and found["valid"] else None


def run(config: ConfigDict, workdir: Path, argv: Sequence[str], dry_run: bool = False) -> dict:
    """Trains what is missing of the table, and writes ablation.md, .csv and .png into `workdir`.

    Args:
        config: what the rows of configs/ablation.py change.
        argv: the flags of the command line, after the program's name; each run gets them, too.
        dry_run: trains nothing, and says what the missing runs would cost.

    Returns:
        The summary: mode, runs, finished, split, rows (`ablation_table.tabulate`), files; or of a
        dry run mode, runs, finished, rows (`ablation_cost.estimate`), seconds.

    Raises:
        UserError: a row is unknown, a run's configuration or data are not as they must be, or a
            file of an earlier run is damaged, or in the way of what will be written.
        RunError: a run failed.
    """
    runs = plan_runs(config, workdir)
    # Before any is trained: what can be told now should cost no run.
    check_outputs(workdir, FILES)
    for planned in runs:
        outputs.check(planned.workdir, also=[_LOG])
        _check_unchanged(planned)
        planned.summary()  # a damaged one raises
    if dry_run:
        # Nothing is trained, but only a store tells how many patches duplicates leave.
        n_train = prepare_with_progress(config.data)["counts"]["train"]
        return {"mode": "ablate", **estimate(runs, n_train)}
    with lock.held(workdir):
        prepare_with_progress(config.data)  # once, not by several runs at the same time
        _train(runs, argv, workers.find(config.ablation.jobs))
        # After a signal, too: a table of as many runs as there are.
        finished = [each for each in runs if each.summary()]
        summary = {"mode": "ablate", "runs": len(runs), "finished": len(finished)}
        if finished:
            table = tabulate(finished, config.eval.threshold)
            summary |= table | {"files": write_table(workdir, table, finished)}
    return summary


def plan_runs(config: ConfigDict, workdir: Path) -> list[Run]:
    """The runs of the table, whole seeds first, so that what is done early can be compared.

    Raises:
        UserError: a row is unknown, or its configuration impossible.
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
    # Here, not in the run's own process, whose turn may come hours later.
    validate(changed)
    return Run(row, seed, workdir / row / f"seed{seed}", changed, changes)


def _check_unchanged(run: Run) -> None:
    """Raises `UserError` where the run has begun otherwise: a table must not mix the two."""
    fix = f"move {run.workdir} away, and it is trained again"
    try:
        old = read_json(run.workdir / "config.json", _fields, fix)
    except FileNotFoundError:
        return
    # Both through JSON, which makes lists of tuples: else they would differ from themselves.
    old, new = _fields(old), _fields(json.loads(run.config.to_json_best_effort()))
    for name in new:
        decides = not name.startswith(_DECIDE_NOTHING)
        # A field that an older version's run did not have can't be compared.
        if decides and name in old and old[name] != new[name]:
            raise UserError(
                f"{run.workdir} was begun with config.{name}={old[name]!r}, not {new[name]!r}: "
                "give another --workdir"
            )


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration as JSON has it, by their dotted names."""
    check_types(config)
    return flatten(ConfigDict(config))


# ---- training -----------------------------------------------------------------------------------


def _train(runs: list[Run], argv: Sequence[str], places: list[Slot]) -> None:
    """Trains what is not finished, a run in each place at a time; a signal stops them all."""
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
                    # Wall time over runs that ended: places that work side by side are in it.
                    left = (time.monotonic() - started) / ended * (len(missing) + len(running))
                    _say(run, summary, left)
        finally:
            # Whatever ends the loop: where one run fails, the others save, and can go on later.
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
    """Starts the public command; what it says goes to log.txt, since several would talk at once."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    changes = [f"--config.{name}={value}" for name, value in run.changes.items()]
    # Of a flag that is given twice, the last counts.
    flags = [*argv, *changes, "--mode=train", f"--workdir={run.workdir}"]
    LOG.info("%s, seed %d: training; %s", run.row, run.seed, _log(run))
    # Appended: a run that goes on keeps what its earlier starts said.
    with open(_log(run), "a") as log:
        command = [sys.executable, "-m", "bef_jax.main", *flags]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=place.environment())
    place.pin(process.pid)
    return run, process


def _log(run: Run) -> Path:
    return run.workdir / _LOG


def _result(run: Run, status: int) -> dict:
    """The summary of a run that has ended.

    Raises:
        UserError: the run refused something.
        RunError: it failed, or somebody stopped it.
    """
    summary = run.summary()
    if status == 0 and summary:
        return summary
    # A refusal is one such line; earlier starts may have left others, so the last one counts.
    lines = [line for line in _last_lines(_log(run)) if line.startswith("error: ")]
    if status == 2 and lines:
        raise UserError(f"{run.row}, seed {run.seed}: {lines[-1].removeprefix('error: ')}")
    raise RunError(
        f"{run.row}, seed {run.seed} ended with status {status}; {_log(run)} says why, and the "
        "same command goes on"
    )


def _last_lines(file: Path) -> list[str]:
    with open_user_file(file) as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST))
        return log.read().decode(errors="replace").splitlines()


def _stop(processes: list[subprocess.Popen]) -> None:
    """Lets runs save and end."""
    for process in processes:
        # SIGTERM: a Ctrl-C in the terminal has reached the runs already, and a second SIGINT would
        # end them without a save.
        process.terminate()
    # Only then waited for, so that all of them save at the same time.
    for process in processes:
        process.wait()


def _say(run: Run, summary: dict, seconds_left: float) -> None:
    block = scored_block(summary)
    auc = "not defined" if block["auc"] is None else f"{block['auc']:.4f}"
    left = timedelta(seconds=round(seconds_left))
    LOG.info("%s, seed %d: %s AUC %s; about %s left", run.row, run.seed, block["split"], auc, left)
