"""Where the time of a run goes, over all its restarts."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds by name, and `wall` since the start; a checkpoint carries them on."""

    def __init__(self) -> None:
        """Starts `wall`."""
        self._seconds: dict[str, float] = {}
        self._running = {"wall": time.perf_counter()}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `name`."""
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
        return self.seconds("loop") - self.seconds("evaluate") - self.seconds("save")

    def snapshot(self) -> dict[str, float]:
        """All seconds so far, for `restore`."""
        return {name: self.seconds(name) for name in {*self._seconds, *self._running}}

    def restore(self, snapshot: dict[str, float]) -> None:
        """Adds an earlier run's seconds, in place of what was counted but not running."""
        self._seconds = dict(snapshot)
