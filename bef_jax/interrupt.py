"""SIGINT and SIGTERM as a request: the loop ends after a save, not in the middle of one."""

import logging
import signal
import threading
from types import FrameType

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
        self._previous: dict = {}

    def __enter__(self) -> "Interrupt":
        """Takes the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {sign: signal.signal(sign, self._request) for sign in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for sign, handler in self._previous.items():
            signal.signal(sign, handler)

    def _request(self, sign: int, _: FrameType | None) -> None:
        if self.requested and sign == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        LOG.warning("%s: saving, then stopping", signal.Signals(sign).name)
