"""The versions of JAX that were tested: .ci/run has a Python for each line."""

import logging

import jax

LOG = logging.getLogger(__name__)

# From this line of JAX to the one below that: pyproject.toml has the same.
TESTED = ((0, 10), (0, 13))


def warn_if_untested(version: str = jax.__version__) -> None:
    """Logs one line of warning where `version` of JAX is outside the range that was tested.

    No error: most of what works with one line of JAX works with the next.
    """
    first, end = TESTED
    if not first <= tuple(map(int, version.split(".")[:2])) < end:
        shown = f">={first[0]}.{first[1]},<{end[0]}.{end[1]}"
        LOG.warning("jax %s is untested here; tested was jax%s", version, shown)
