"""Where the time of a run goes, over all its restarts."""

import contextlib
import time
from collections.abc import Iterator


class Laps:
    """How the time since a start divides: a name for each stretch, in the order they came."""

    def __init__(self, start: float | None = None):
        """Begins at `start`, a reading of time.perf_counter; now without it."""
        # perf_counter, as everywhere here: time.time() jumps where a clock is set.
        self._start = self._last = time.perf_counter() if start is None else start
        self._seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Ends a stretch."""
        now = time.perf_counter()
        self._seconds[name], self._last = now - self._last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._seconds.items())
        return f"{self._last - self._start:.1f} s after the start: {parts}"


class Clock:
    """Seconds by name, and `wall` since the start; a checkpoint carries them on."""

    def __init__(self) -> None:
        """Starts `wall`."""
        self._seconds: dict[str, float] = {}
        self._running = {"wall": time.perf_counter()}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `name`."""
        # Kept while running, so that a save in the middle of the loop counts the loop up to it.
        self._running[name] = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - self._running.pop(name)
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def seconds(self, name: str) -> float:
        """Seconds of `name` so far, those that are running included."""
        started = self._running.get(name)
        running = 0.0 if started is None else time.perf_counter() - started
        return self._seconds.get(name, 0.0) + running

    def training_seconds(self) -> float:
        """Seconds of the loop without its evaluations and saves."""
        # Evaluations and saves are inside the loop's seconds; compiling comes before it.
        return self.seconds("loop") - self.seconds("evaluate") - self.seconds("save")

    def snapshot(self) -> dict[str, float]:
        """All seconds so far, for `restore`."""
        return {name: self.seconds(name) for name in {*self._seconds, *self._running}}

    def restore(self, snapshot: dict[str, float]) -> None:
        """Adds an earlier run's seconds, in place of what was counted but not running."""
        # What is running goes on: `wall` began with this start, and comes on top.
        self._seconds = dict(snapshot)
