"""The lines of metrics.jsonl, which TensorBoard gets as well."""

import json
import os
import sys
from pathlib import Path

from bef_jax import distributed

# tensorboardX imports torch where it is installed, for tensors that nobody gives it here: two
# seconds of every start. An entry of None is what makes Python say that it is not.
_torch = sys.modules.setdefault("torch", None)
from tensorboardX import SummaryWriter  # noqa: E402

if _torch is None:
    del sys.modules["torch"]


class History:
    """What a run logged, a dict per line: training figures, or those of an evaluation.

    Of several processes the first writes; the others keep the same lines.
    """

    def __init__(self, workdir: Path):
        """Goes on with the lines that the workdir has."""
        self._file = Path(workdir) / "metrics.jsonl"
        self._writes = distributed.is_first()
        # Made in every process, since callers need not know who writes; the others' goes nowhere.
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), write_to_disk=self._writes)
        self.lines = _read(self._file)

    def truncate(self, step: int) -> None:
        """Drops lines after `step`: a run that goes on from there writes them again."""
        # A kill after the last save leaves lines of steps that the resumed run takes again.
        self.lines = [line for line in self.lines if line["step"] <= step]
        if not self._writes:
            return
        # Written anew and renamed: a kill in between leaves the old lines, or the new ones.
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(temporary, self._file)

    def write(self, step: int, **figures: float) -> None:
        """Appends a line."""
        line = {"step": step, **figures}
        self.lines.append(line)
        if not self._writes:
            return
        # Opened for each line, so that nothing is left in Python's buffers when a kill comes.
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        # Else TensorBoard would see them up to two minutes late, by tensorboardX's default.
        self._events.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self._events.close()


def _read(file: Path) -> list[dict]:
    """Reads whole lines; one that a kill cut short is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
