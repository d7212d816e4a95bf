"""What an ablation would cost, before it is begun."""

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from bef_jax.planning.flops import training_flops
from bef_jax.training.durations import durations
from bef_jax.training.state import abstract_state, count_params

LOG = logging.getLogger(__name__)


def estimate(runs: Sequence[Any], n_train: int) -> dict[str, Any]:
    """Counts what the missing runs would train on, and their time where one was measured.

    Args:
        runs: `ablate.Run`s.
        n_train: patches of the training split.

    Returns:
        runs, finished, seconds, and rows: of each name runs, finished, params,
        training_flops_per_image, images (that the missing runs take in) and seconds (that they
        take, one at a time). These rest on the row's own finished runs; without any, on those of
        another row, in the ratio of the arithmetic; without these, they are None.
    """
    by_row: dict[str, list] = {}
    for run in runs:
        by_row.setdefault(run.row, []).append(run)
    # Both for all rows first: one without a finished run takes another's speed.
    rows = {name: _count(of_row, n_train) for name, of_row in by_row.items()}
    speeds = {name: _speed(of_row) for name, of_row in by_row.items()}
    for name, row in rows.items():
        row["seconds"] = _seconds(row, speeds[name] or _scaled(row, rows, speeds))
        LOG.info("%s", _line(name, row))
    seconds = [row["seconds"] for row in rows.values()]
    finished = sum(row["finished"] for row in rows.values())
    # Not the sum of those that are known, which would be taken for the whole.
    total = None if None in seconds else sum(seconds)
    return {"runs": len(runs), "finished": finished, "seconds": total, "rows": rows}


def _count(runs: list, n_train: int) -> dict[str, Any]:
    # Seeds change nothing of what a row costs.
    config = runs[0].config
    # A run that was stopped on its way counts whole: only its end is looked at.
    missing = [run for run in runs if not run.summary()]
    steps = durations(config, n_train).steps
    return {
        "runs": len(runs),
        "finished": len(runs) - len(missing),
        # By shapes alone: no parameter is made.
        "params": count_params(abstract_state(config).params),
        "training_flops_per_image": training_flops(config),
        "images": len(missing) * steps * config.batch_size,
    }


def _speed(runs: list) -> float | None:
    """Images per second of whole runs: with compilation, evaluation and the report."""
    speeds = [
        summary["step"] * run.config.batch_size / summary["wall_seconds"]
        for run in runs
        if (summary := run.summary())
    ]
    # One run on a busy machine would move a mean.
    return float(np.median(speeds)) if speeds else None


def _scaled(
    row: dict, rows: Mapping[str, dict], speeds: Mapping[str, float | None]
) -> float | None:
    known = [name for name, speed in speeds.items() if speed]
    if not known:
        return None
    # By arithmetic alone, while on accelerators memory bounds these networks: a rough guess.
    other = known[0]
    ratio = rows[other]["training_flops_per_image"] / row["training_flops_per_image"]
    return speeds[other] * ratio


def _seconds(row: dict, speed: float | None) -> float | None:
    if not row["images"]:
        # Nothing is left, and that takes no time whether a speed is known or not.
        return 0.0
    return row["images"] / speed if speed else None


def _line(name: str, row: dict) -> str:
    seconds = row["seconds"]
    time = "time unknown" if seconds is None else f"{timedelta(seconds=round(seconds))}"
    return (
        f"{name}: {row['runs'] - row['finished']} of {row['runs']} runs to train, "
        f"{row['images']:,} patches, {row['training_flops_per_image'] / 1e9:.2f} GFLOP each, {time}"
    )
