"""The summary that every mode ends with."""

from pathlib import Path

from bef_jax.runtime.files import write_json


def write_summary(workdir: Path, summary: dict) -> None:
    """Writes WORKDIR/<mode>_summary.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(summary_file(workdir, summary["mode"]), summary)


def summary_file(workdir: Path, mode: str) -> Path:
    """Returns the path of a mode's summary."""
    return workdir / f"{mode}_summary.json"
