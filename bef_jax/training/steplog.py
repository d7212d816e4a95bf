"""Turns the metrics of single steps into lines of metrics.jsonl and the progress bar."""

import itertools
import math

import jax
import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.batches import make_order
from bef_jax.data.store import Split
from bef_jax.errors import DivergedError
from bef_jax.runtime.progress import Progress
from bef_jax.training.clock import Clock
from bef_jax.training.history import History
from bef_jax.training.step_counts import StepCounts


class StepLog:
    """Holds the metrics of steps on the device until the next line is due.

    A line is written while the next step runs, so that the devices do not wait for the host; only a
    save or an evaluation waits. One call of the compiled function runs n steps.
    """

    def __init__(
        self,
        config: ConfigDict,
        counts: StepCounts,
        train: Split,
        history: History,
        clock: Clock,
        bar: Progress,
    ):
        """Begins with an empty log; rates are measured from now on."""
        self._config, self._counts, self._train = config, counts, train
        self._history, self._clock, self._bar = history, clock, bar
        self._pending: list[tuple[int, dict, int]] = []  # step, its call's metrics, place in them
        self._in_flight = 0  # how many steps the last call took
        self._mark = clock.training_seconds(), clock.seconds("wait")

    def add(self, step: int, metrics: dict) -> None:
        """Takes the metrics of the call that made the state of `step`, without waiting.

        Args:
            metrics: float32 by name; scalars of a single step, or [n] of the call's n steps.
        """
        # Keep references only, because the device may not have computed the arrays yet. A call of n
        # steps has one array of n values for each figure.
        self._in_flight = n = metrics["loss"].size
        self._pending += [(step - n + 1 + place, metrics, place) for place in range(n)]

    def flush(self, everything: bool) -> None:
        """Writes the lines that are due, except those of steps in flight.

        Args:
            everything: also waits for steps in flight and writes them, before evaluating or saving.

        Raises:
            DivergedError: a loss is not finite; it names the step and the batch's ids.
        """
        every = self._config.log_every
        # Reading a step in flight would block the host until the devices are done. Then the devices
        # would be idle until the host dispatches again.
        done = self._pending if everything else self._pending[: -self._in_flight]
        if not done:
            return
        # Without `everything`, a line ends at a multiple of log_every, for calls of any size.
        last = done[-1][0]
        due = last if everything else last // every * every
        ready = [item for item in done if item[0] <= due]
        if not ready:
            return
        self._pending = self._pending[len(ready) :]
        steps = [step for step, _, _ in ready]
        # Fetch with one call, so that all figures are copied at the same time.
        fetched = jax.device_get([metrics for _, metrics, _ in ready])
        values = [
            {name: np.ravel(value)[place] for name, value in metrics.items()}
            for metrics, (_, _, place) in zip(fetched, ready, strict=True)
        ]
        # Check before a line is written or a state is saved, so that a loss that is not finite is
        # neither logged nor followed by a save.
        self._check_finite(steps, values)
        rates = self._rates(len(steps))
        # A line has the steps after a multiple of log_every, or a save, up to the next of either.
        lines = itertools.groupby(zip(steps, values, strict=True), lambda x: (x[0] - 1) // every)
        for _, line in lines:
            line_steps, line_values = zip(*line, strict=True)
            self._write(line_steps, line_values, rates)

    def _write(self, steps: list[int], values: list[dict], rates: dict[str, float]) -> None:
        figures = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        # Log the last value, not the mean, because it is exact for the step that the line names.
        figures["learning_rate"] = float(values[-1]["learning_rate"])
        epoch = steps[-1] / self._counts.steps_per_epoch
        self._history.write(steps[-1], epoch=epoch, **figures, **rates)
        self._bar.update(steps[-1], **figures, **rates)

    def _rates(self, steps: int) -> dict[str, float]:
        """Returns images per second and the share of time spent waiting, since the last lines."""
        now = self._clock.training_seconds(), self._clock.seconds("wait")
        # Keep `spent` above 0, because it is a divisor.
        spent, waited = (max(a - b, 1e-9) for a, b in zip(now, self._mark, strict=True))
        self._mark = now
        return {
            "images_per_second": steps * self._config.batch_size / spent,
            "input_wait_fraction": min(waited / spent, 1.0),
        }

    def _check_finite(self, steps: list[int], values: list[dict]) -> None:
        for step, metrics in zip(steps, values, strict=True):
            if math.isfinite(metrics["loss"]):
                continue
            # A batch is a function of the step, so it was not kept and is computed again. Step N
            # trains on the batch of step N - 1, because steps are counted when they are done.
            rows = make_order(self._config, self._train.labels)(step - 1)
            ids = ", ".join(map(str, self._train.ids[rows]))
            text = f"the loss of step {step} is not finite; its batch: {ids}"
            # Step N computes the loss of the state of step N - 1, so that state may be bad. The
            # state before it had a finite loss.
            raise DivergedError(text, last_good=step - 2)
