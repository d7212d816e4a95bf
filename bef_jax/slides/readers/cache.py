"""Keeps what was made last, up to a limit of memory."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import numpy as np


class ArrayCache:
    """Arrays by key; when they take more bytes than the limit, the oldest ones are dropped.

    Threads that want the same array at the same time wait for the one that makes it.
    """

    def __init__(self, limit: int) -> None:
        """Takes the limit in bytes; an array above it is kept until the next one is made."""
        self._limit = limit
        self._bytes = 0
        self._lock = threading.Lock()
        self._arrays: OrderedDict[Hashable, Future[np.ndarray]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the array of a key; `make` makes it if it isn't there."""
        with self._lock:
            found = self._arrays.get(key)
            if found:
                self._arrays.move_to_end(key)
            else:
                mine = self._arrays[key] = Future()
        if found:
            return found.result()
        self._fill(key, mine, make)
        return mine.result()

    def _fill(self, key: Hashable, future: Future, make: Callable[[], np.ndarray]) -> None:
        try:
            array = make()
        except BaseException as error:  # or other threads would wait without end
            with self._lock:
                del self._arrays[key]
            future.set_exception(error)
            return
        future.set_result(array)
        with self._lock:
            self._bytes += array.nbytes
            if self._bytes > self._limit:
                self._drop(key)

    def _drop(self, newest: Hashable) -> None:
        for key in list(self._arrays):
            if self._bytes <= self._limit:
                return
            # What is still being made has no size yet.
            if key != newest and self._arrays[key].done():
                self._bytes -= self._arrays.pop(key).result().nbytes
