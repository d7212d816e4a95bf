"""The history of a run: the lines of metrics.jsonl, which TensorBoard also gets."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from bef_jax.errors import UserError
from bef_jax.runtime import distributed
from bef_jax.runtime.files import open_user_file, replacing

# If torch is installed, tensorboardX imports it, which costs two seconds of every start. It is only
# for torch's tensors, which are never used here. An entry of None makes Python refuse the import.
_torch = sys.modules.setdefault("torch", None)
from tensorboardX import SummaryWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402

if _torch is None:
    del sys.modules["torch"]

# Limits for metrics.jsonl, so that any file takes less than 1 GiB of memory. A run that logs every
# step reaches them after 400,000 steps.
_MOST_FIGURES = 1 << 22
_LONGEST = 1 << 27  # bytes
_LONGEST_LINE = 1 << 16  # bytes; our lines have about 300


class History:
    """What a run logged: one dict per line, with the figures of training or of an evaluation.

    Of several processes, only the first writes; the others keep the same lines in memory.
    """

    def __init__(self, workdir: Path):
        """Reads the lines that the workdir already has.

        Raises:
            UserError: metrics.jsonl is not a regular file, or is longer than a run writes.
        """
        self._file = Path(workdir) / "metrics.jsonl"
        self._writes = distributed.is_first()
        self.lines = _read(self._file)
        # Every process has a writer, so that callers need not know which process really writes.
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), write_to_disk=self._writes)

    def truncate(self, step: int) -> None:
        """Drops the lines after `step`, because a run that goes on from there writes them again."""
        # A kill after the last save leaves lines of steps that are taken again. A kill before the
        # first save leaves lines, but no checkpoint to go on from.
        self.lines = [line for line in self.lines if line["step"] <= step]
        if not self._writes:
            return
        if self._file.exists():
            with replacing(self._file, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.lines)
        # This tells TensorBoard to ignore events of later steps that earlier starts left.
        start = Event(session_log=SessionLog(status=SessionLog.START))
        self._events.file_writer.add_event(start, step=step + 1)

    def write(self, step: int, **figures: float) -> None:
        """Appends a line, and gives its figures to TensorBoard."""
        line = {"step": step, **figures}
        self.lines.append(line)
        if not self._writes:
            return
        # Open the file for each line, so that a kill loses nothing in Python's buffers.
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        # Flush now, because by default tensorboardX may wait for two minutes.
        self._events.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self._events.close()


def _read(file: Path) -> list[dict[str, Any]]:
    """Returns the complete lines, without those that a kill or a power cut broke."""
    lines, figures = [], 0
    for text in _raw_lines(file):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_line(line):
            # Intern the names, so that memory holds each of them only once.
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
    raise UserError(f"{file}: is longer than any that a run writes; move it away")


def _is_line(line: Any) -> bool:
    """Returns whether a run wrote `line`: a step, an epoch, and figures, which may be None."""
    if not isinstance(line, dict) or not all(map(_is_figure, line.values())):
        return False
    step, epoch = line.get("step"), line.get("epoch")
    return type(step) is int and step >= 0 and epoch is not None and math.isfinite(epoch)


def _is_figure(value: Any) -> bool:
    # Compare types, because True is an instance of int. Limit integers, because plots take floats,
    # and a float64 is exact only up to 2^53.
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**53)
