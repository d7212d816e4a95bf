"""The lines of metrics.jsonl, which TensorBoard gets as well."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from bef_jax.errors import UserError
from bef_jax.runtime import distributed
from bef_jax.runtime.files import open_user_file, replacing

# tensorboardX imports torch where it is installed, for tensors that nobody gives it here: two
# seconds of every start. An entry of None is what makes Python say that it is not.
_torch = sys.modules.setdefault("torch", None)
from tensorboardX import SummaryWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402

if _torch is None:
    del sys.modules["torch"]

# Limits of metrics.jsonl, so that memory stays below 1 GiB whatever the file holds. A run that logs
# each of its steps meets them after 400,000.
_MOST_FIGURES = 1 << 22
_LONGEST = 1 << 27  # bytes
_LONGEST_LINE = 1 << 16  # bytes: a line of ours has some 300


class History:
    """What a run logged, a dict per line: training figures, or those of an evaluation.

    Of several processes the first writes; the others keep the same lines.
    """

    def __init__(self, workdir: Path):
        """Goes on with the lines that the workdir has.

        Raises:
            UserError: metrics.jsonl is no regular file, or longer than any that is written.
        """
        self._file = Path(workdir) / "metrics.jsonl"
        self._writes = distributed.is_first()
        self.lines = _read(self._file)
        # Made in every process, since callers need not know who writes; the others' goes nowhere.
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), write_to_disk=self._writes)

    def truncate(self, step: int) -> None:
        """Drops lines after `step`: a run that goes on from there writes them again."""
        # A kill after the last save leaves lines of steps that are taken again, and one before the
        # first save leaves lines of a start that nothing goes on from.
        self.lines = [line for line in self.lines if line["step"] <= step]
        if not self._writes:
            return
        if self._file.exists():
            with replacing(self._file, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.lines)
        # By this TensorBoard knows that events of later steps, which earlier starts left, are void.
        start = Event(session_log=SessionLog(status=SessionLog.START))
        self._events.file_writer.add_event(start, step=step + 1)

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


def _read(file: Path) -> list[dict[str, Any]]:
    """Reads the lines that a run wrote whole; what a kill or a power cut left is left out."""
    lines, figures = [], 0
    for text in _raw_lines(file):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_line(line):
            # Names that are the same in each line are held once.
            lines.append({sys.intern(name): value for name, value in line.items()})
            figures += 1 + len(line)  # the dict itself takes memory, too
        if figures > _MOST_FIGURES:
            _refuse(file)
    return lines


def _raw_lines(file: Path) -> Iterator[bytes]:
    try:
        with open_user_file(file) as stream:
            while text := stream.readline(_LONGEST_LINE):
                if stream.tell() > _LONGEST:
                    _refuse(file)
                yield text
    except FileNotFoundError:
        return


def _refuse(file: Path) -> NoReturn:
    raise UserError(f"{file}: longer than any that a run writes; move it away")


def _is_line(line: Any) -> bool:
    """Whether a run wrote `line`: a step, an epoch, and figures, of which some may be None."""
    if not isinstance(line, dict) or not all(map(_is_figure, line.values())):
        return False
    step, epoch = line.get("step"), line.get("epoch")
    return type(step) is int and step >= 0 and epoch is not None and math.isfinite(epoch)


def _is_figure(value: Any) -> bool:
    # By type, since True is an int; within what a float64 counts exactly, since plots take floats.
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**53)
