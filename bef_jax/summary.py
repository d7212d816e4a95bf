"""The summary that every mode ends with."""

import json
import os
from pathlib import Path


def write_summary(workdir: Path, summary: dict) -> None:
    """Writes WORKDIR/<mode>_summary.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    mode = summary["mode"]
    temporary = workdir / f".{mode}_summary.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, workdir / f"{mode}_summary.json")
