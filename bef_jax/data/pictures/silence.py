"""Keeps Pillow's warnings off stderr."""

import contextlib
import threading
import warnings


class _Silence(contextlib.AbstractContextManager):
    """Silences warnings while any thread is inside, because this module checks sizes and tags.

    catch_warnings alone is not safe in threads: they would restore each other's filters.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.close()


SILENCE = _Silence()
