"""The versions of JAX that were tested; .ci/run has one Python for each minor version."""

import logging

import jax

LOG = logging.getLogger(__name__)

# The first minor version that was tested, and the first that was not; as in pyproject.toml.
TESTED = ((0, 10), (0, 13))


def warn_if_untested(version: str = jax.__version__) -> None:
    """Logs a warning of one line if `version` of JAX is outside the range that was tested.

    It is not an error, because most of what works with one minor version works with the next.
    """
    first, end = TESTED
    if not first <= tuple(map(int, version.split(".")[:2])) < end:
        shown = f">={first[0]}.{first[1]},<{end[0]}.{end[1]}"
        LOG.warning("jax %s is untested; if it fails, install jax%s", version, shown)
