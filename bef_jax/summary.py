"""The summary that every mode ends with."""

import json
import os
from pathlib import Path


def write_summary(workdir: Path, summary: dict) -> None:
    """Writes WORKDIR/<mode>_summary.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / f"{summary['mode']}_summary.json", summary)


def write_json(file: Path, content: dict | list) -> None:
    """Writes `content` to `file`, whole or not at all."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes `text` to `file` as UTF-8, whole or not at all."""
    # In the same folder, since a rename is atomic on one file system only. Hidden, so that whoever
    # lists results does not meet it.
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    # No fsync: it guards against a kill, not against a power cut.
    os.replace(temporary, file)
