"""The estimated cost of an ablation, before it starts."""

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from bef_jax.planning.flops import training_flops
from bef_jax.training.state import abstract_state, count_params
from bef_jax.training.step_counts import count_steps

LOG = logging.getLogger(__name__)


def estimate(trials: Sequence[Any], n_train: int) -> dict[str, Any]:
    """Counts the images that the missing trials would train on, and estimates their time.

    Args:
        trials: `ablate.Trial`s.
        n_train: patches of the training split.

    Returns:
        runs (the number of trials), finished, seconds and rows. Each row has runs, finished,
        params, training_flops_per_image, images (that its missing trials train on) and seconds
        (that they take, one at a time). The seconds come from the speed of the row's finished
        trials. A row without any takes another row's speed, scaled by the arithmetic; without that,
        it has None.
    """
    by_row: dict[str, list] = {}
    for trial in trials:
        by_row.setdefault(trial.row, []).append(trial)
    # Collect all rows first, because a row without a finished trial takes another's speed.
    rows = {name: _count(of_row, n_train) for name, of_row in by_row.items()}
    speeds = {name: _speed(of_row) for name, of_row in by_row.items()}
    for name, row in rows.items():
        speed = speeds[name] or _speed_of_other_row(row, rows, speeds)
        row["seconds"] = _seconds(row, speed)
        LOG.info("%s", _line(name, row))
    seconds = [row["seconds"] for row in rows.values()]
    finished = sum(row["finished"] for row in rows.values())
    # The total is unknown if a row's time is: a partial sum would look like the total.
    total = None if None in seconds else sum(seconds)
    return {"runs": len(trials), "finished": finished, "seconds": total, "rows": rows}


def _count(trials: list, n_train: int) -> dict[str, Any]:
    # A row costs the same with every seed.
    config = trials[0].config
    # A trial that was stopped halfway counts as wholly missing: only a final summary is read.
    missing = [trial for trial in trials if not trial.summary()]
    steps = count_steps(config, n_train).steps
    return {
        "runs": len(trials),
        "finished": len(trials) - len(missing),
        # From shapes only, so that no parameters are allocated.
        "params": count_params(abstract_state(config).params),
        "training_flops_per_image": training_flops(config),
        "images": len(missing) * steps * config.batch_size,
    }


def _speed(trials: list) -> float | None:
    """Returns the images/s of whole trials, with compilation, evaluation and the report."""
    speeds = [
        summary["step"] * trial.config.batch_size / summary["wall_seconds"]
        for trial in trials
        if (summary := trial.summary())
    ]
    # The median, because one trial on a busy machine would move a mean.
    return float(np.median(speeds)) if speeds else None


def _speed_of_other_row(
    row: dict, rows: Mapping[str, dict], speeds: Mapping[str, float | None]
) -> float | None:
    """Returns the speed of a row with finished trials, scaled to the arithmetic of `row`."""
    known = [name for name, speed in speeds.items() if speed]
    if not known:
        return None
    # This is a rough guess: on accelerators memory limits these networks, not arithmetic.
    other = known[0]
    ratio = rows[other]["training_flops_per_image"] / row["training_flops_per_image"]
    return speeds[other] * ratio


def _seconds(row: dict, speed: float | None) -> float | None:
    if not row["images"]:
        # Nothing is left to train, so no speed is needed.
        return 0.0
    return row["images"] / speed if speed else None


def _line(name: str, row: dict) -> str:
    seconds = row["seconds"]
    time = "time unknown" if seconds is None else f"{timedelta(seconds=round(seconds))}"
    return (
        f"{name}: {row['runs'] - row['finished']} of {row['runs']} runs to train, "
        f"{row['images']:,} patches, {row['training_flops_per_image'] / 1e9:.2f} GFLOP each, {time}"
    )
