"""The files that runs write into a workdir: their names, and the summary of each mode."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bef_jax.errors import UserError
from bef_jax.runtime import distributed
from bef_jax.runtime.files import check_outputs, check_types, read_json, write_json, write_text

_SCORES = ("scores_valid.csv", "scores_test.csv")
FILES = ("config.json", "metrics.jsonl", "train_summary.json", *_SCORES)
FOLDERS = ("checkpoints", "tensorboard", "report")
_PLOTS = ("loss", "validation", "roc", "precision_recall", "reliability", "most_wrong")
_OF_SPLITS = ("roc_valid", "roc_test", "confusion_valid", "confusion_test")  # of many classes
REPORT = ("index.html", *(f"{name}.png" for name in (*_PLOTS, *_OF_SPLITS)))
_FIGURES = ("auc", "accuracy", "loss", "brier", "ece")  # None if not defined


def check_writable(workdir: Path, also: Iterable[str] = ()) -> None:
    """Raises `UserError` if a run, or the program that starts it, could not write its files.

    Args:
        also: names of further files.
    """
    check_outputs(workdir, [*FILES, *also], FOLDERS)
    check_outputs(workdir / "report", REPORT)


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json by the first process; the others check that they see it.

    Raises:
        UserError: this process does not see the file that the first one wrote.
    """
    file = workdir / "config.json"
    with distributed.first_alone("config.json"):
        if distributed.is_first():
            write_text(file, config.to_json_best_effort(indent=2) + "\n")
        elif not file.exists():
            raise UserError(f"{workdir}: is not shared by all hosts; give a --workdir that is")


def write_summary(workdir: Path, summary: dict) -> None:
    """Writes WORKDIR/<mode>_summary.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(summary_file(workdir, summary["mode"]), summary)


def summary_file(workdir: Path, mode: str) -> Path:
    """Returns the path of a mode's summary."""
    return workdir / f"{mode}_summary.json"


def read_train_summary(workdir: Path) -> dict | None:
    """Returns the summary of a training run, its keys and types checked; None without a summary.

    Raises:
        UserError: the file is damaged.
    """
    file = summary_file(workdir, "train")
    try:
        return read_json(file, _check_train, "delete it and run again")
    except FileNotFoundError:
        return None


def _check_train(found: Any) -> None:
    check_types(found, step=int, params=int, images_per_second=float, wall_seconds=float)
    check_types(found, best_step=int | None, valid=dict | None, test=dict | None)
    figures = [found["images_per_second"], found["wall_seconds"]]
    for split in ("valid", "test"):
        if (block := found[split]) is None:
            continue
        check_types(block, split=str, n=int, **dict.fromkeys(_FIGURES, int | float | None))
        figures += [block[name] for name in _FIGURES if block[name] is not None]
        if block["split"] != split:
            raise ValueError(f"{split} has the figures of {block['split']}")
    if not all(map(math.isfinite, figures)) or found["wall_seconds"] <= 0:
        raise ValueError("a number is not finite, or wall_seconds is not above 0")
    if not 0 <= found["step"] < 2**31:
        raise ValueError(f"step is {found['step']}, not in 0 .. 2^31 - 1")
