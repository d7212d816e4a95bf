"""SIGINT and SIGTERM as a request: the loop ends after a save, not in the middle of one.

Of several processes any may get the signal, and all stop after the same step.
"""

import logging
import os
import signal
import threading
from types import FrameType

import jax

from bef_jax.runtime import distributed

LOG = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context manager in which the first signal only sets `requested`.

    A second SIGINT raises KeyboardInterrupt, for someone who won't wait; saves are atomic, so it
    costs the steps since the last one. Outside the main thread Python allows no handlers, and
    nothing is caught.
    """

    def __init__(self) -> None:
        """Catches nothing yet."""
        self.requested = False
        self._several = jax.distributed.is_initialized()
        self._asked = -1  # the last step that the processes were asked about
        self._previous: dict = {}

    def __enter__(self) -> "Interrupt":
        """Takes the signals over."""
        if threading.current_thread() is threading.main_thread():
            # Of several processes, JAX has taken SIGTERM over: it tells the others.
            signals = SIGNALS[:1] if self._several else SIGNALS
            self._previous = {sign: signal.signal(sign, self._request) for sign in signals}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for sign, handler in self._previous.items():
            signal.signal(sign, handler)

    def _request(self, sign: int, _: FrameType | None) -> None:
        if self.requested and sign == signal.SIGINT:
            # Not at a second SIGTERM: launchers may send several, and wait before they kill.
            raise KeyboardInterrupt
        # A flag that the loop reads: a handler runs between any two bytecodes, also in the middle
        # of a save, and must not do more.
        self.requested = True
        LOG.warning("%s: saving, then stopping", signal.Signals(sign).name)
        if self._several:
            # A Ctrl-C may reach this process alone; as SIGTERM, JAX passes it on to the others.
            os.kill(os.getpid(), signal.SIGTERM)

    def stops_at(self, step: int) -> bool:
        """Whether the loop is to end with `step` done; asked at the end of every call.

        Of several processes each gets the same answers.
        """
        if not self._several:
            return self.requested
        # From 0: a notice that came before the first question may have been agreed for step 1.
        steps, self._asked = range(self._asked + 1, step + 1), step
        agreed = distributed.is_stop_agreed(steps)
        if agreed:
            LOG.warning("a host got a signal: all save at step %d, and stop", step)
        return agreed
