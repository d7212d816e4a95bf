"""Boosted EfficientNet in JAX and Flax."""

import time

# The first line of ours that a command runs, so its time to the first step counts from here. What
# is left out is the interpreter's own start, some 50 ms.
STARTED = time.perf_counter()

__version__ = "0.1.0"
