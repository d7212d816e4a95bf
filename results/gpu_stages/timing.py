"""Times functions that take microseconds."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax import Array


def timed(function: Callable, *arguments: Array, count: int = 10) -> float:
    """Returns the seconds of a call: the median of five runs of `count`.

    It waits once a run, because the host would take longer to wait than a short kernel runs.
    """
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(count)]
        jax.block_until_ready(results[-1])
        seconds.append((time.perf_counter() - start) / count)
    return float(np.median(seconds))
