"""Clocks that show where the time of a run goes: until its first step, and over all restarts."""

import contextlib
import time
from collections.abc import Iterator


class Laps:
    """The time since a start, cut into stretches that have names and follow each other."""

    def __init__(self, start: float | None = None):
        """Begins at `start`, a value of time.perf_counter; None means now."""
        # Do not use time.time(), because it jumps when the system's clock is set.
        self._start = self._last = time.perf_counter() if start is None else start
        self._seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Ends the present stretch and names it."""
        now = time.perf_counter()
        self._seconds[name], self._last = now - self._last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._seconds.items())
        return f"{self._last - self._start:.1f} s after the start: {parts}"


class Clock:
    """Seconds by name, with `wall` since the start; a checkpoint passes them to the next start."""

    def __init__(self) -> None:
        """Starts `wall`."""
        self._seconds: dict[str, float] = {}
        self._running = {"wall": time.perf_counter()}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `name`."""
        # Keep the start, so that a save in the middle of the loop counts the loop up to now.
        self._running[name] = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - self._running.pop(name)
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def seconds(self, name: str) -> float:
        """Returns the seconds of `name` so far, including a measurement that is still running."""
        started = self._running.get(name)
        running = 0.0 if started is None else time.perf_counter() - started
        return self._seconds.get(name, 0.0) + running

    def training_seconds(self) -> float:
        """Returns the seconds of the loop without its evaluations and saves."""
        # Compiling is not subtracted, because it comes before the loop.
        return self.seconds("loop") - self.seconds("evaluate") - self.seconds("save")

    def snapshot(self) -> dict[str, float]:
        """Returns all seconds so far, for `restore`."""
        return {name: self.seconds(name) for name in {*self._seconds, *self._running}}

    def restore(self, snapshot: dict[str, float]) -> None:
        """Sets the seconds to those of an earlier start; running measurements go on."""
        # `wall` of this start is still running, so it is added to the earlier one.
        self._seconds = dict(snapshot)
