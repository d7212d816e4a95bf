"""SIGINT and SIGTERM as a request: the loop ends after a save, not in the middle of one.

Any process of a run may get the signal, and all of them stop after the same step.
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

    A second SIGINT raises KeyboardInterrupt, for a user who does not want to wait. Saves are
    atomic, so this loses only the steps since the last save. Outside the main thread Python allows
    no handlers, and nothing is caught.
    """

    def __init__(self) -> None:
        """Prepares the state; nothing is caught yet."""
        self.requested = False
        self._is_distributed = jax.distributed.is_initialized()
        self._last_asked_step = -1  # the processes were asked about all steps up to this one
        self._previous: dict = {}

    def __enter__(self) -> "Interrupt":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            # In a run of several processes JAX handles SIGTERM itself, because it tells the others.
            signals = SIGNALS[:1] if self._is_distributed else SIGNALS
            self._previous = {signum: signal.signal(signum, self._request) for signum in signals}
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the previous handlers."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, _: FrameType | None) -> None:
        if self.requested and signum == signal.SIGINT:
            # Not for SIGTERM, because launchers may send several of it, and wait before they kill.
            raise KeyboardInterrupt
        # Only set a flag, which the loop reads, because a handler runs between any two bytecodes,
        # even in the middle of a save.
        self.requested = True
        LOG.warning("%s: saving, then stopping", signal.Signals(signum).name)
        if self._is_distributed:
            # A Ctrl-C may reach only this process, but JAX passes a SIGTERM on to the others.
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop_at(self, step: int) -> bool:
        """Returns whether the loop must end after `step`; the loop asks after every call.

        All processes of a run get the same answers.
        """
        if not self._is_distributed:
            return self.requested
        # Begin at 0, because the processes may have agreed on step 1 before the first question.
        steps = range(self._last_asked_step + 1, step + 1)
        self._last_asked_step = step
        agreed = distributed.is_stop_agreed(steps)
        if agreed:
            LOG.warning("a host got a signal: all hosts save at step %d and stop", step)
        return agreed
