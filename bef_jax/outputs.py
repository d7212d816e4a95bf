"""What a training run writes, by its names in the workdir."""

from collections.abc import Iterable
from pathlib import Path

from bef_jax.runtime.files import check_outputs

_SCORES = ("scores_valid.csv", "scores_test.csv")
FILES = ("config.json", "metrics.jsonl", "train_summary.json", *_SCORES)
FOLDERS = ("checkpoints", "tensorboard", "report")
_PLOTS = ("loss", "validation", "roc", "precision_recall", "reliability", "most_wrong")
REPORT = ("index.html", *(f"{name}.png" for name in _PLOTS))


def check(workdir: Path, also: Iterable[str] = ()) -> None:
    """Raises `UserError` where a run, or what starts it, could not write what it will write.

    Args:
        also: names of further files.
    """
    check_outputs(workdir, [*FILES, *also], FOLDERS)
    check_outputs(workdir / "report", REPORT)
