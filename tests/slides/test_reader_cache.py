"""Checks the cache of decoded strips and tiles."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bef_jax.slides.readers.cache import ArrayCache


def test_the_oldest_arrays_go_when_the_limit_is_reached():
    cache, made = ArrayCache(3000), []

    def get(key, size=1000):
        def make():
            made.append(key)
            return np.full(size, key, np.uint8)

        return cache.get(key, make)

    for key in (1, 2, 3, 1, 4):
        assert (get(key) == key).all()
    assert made == [1, 2, 3, 4]
    get(1)
    get(2)  # was used least lately, so that 4 took its place
    assert made == [1, 2, 3, 4, 2]
    get(5, 9000)
    get(5)
    assert made == [1, 2, 3, 4, 2, 5]
    get(6)
    get(5)
    assert made == [1, 2, 3, 4, 2, 5, 6, 5]


def test_threads_wait_for_the_one_that_makes_an_array():
    cache, made, barrier = ArrayCache(1000), [], threading.Barrier(8)

    def make():
        made.append(1)
        return np.arange(10)

    def get(_):
        barrier.wait()
        return cache.get("key", make)

    with ThreadPoolExecutor(8) as pool:
        assert all((each == np.arange(10)).all() for each in pool.map(get, range(8)))
    assert len(made) == 1


def test_an_error_reaches_all_and_the_next_try_is_a_new_one():
    cache = ArrayCache(1000)

    def fail():
        raise MemoryError("no room")

    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            cache.get("key", fail)
    assert cache.get("key", lambda: np.ones(1)) == 1
