"""The versions of the software that runs, and those of JAX that were tested."""

import logging
import platform
from importlib import metadata

import jax

LOG = logging.getLogger(__name__)

# The first minor version that was tested, and the first that was not; as in pyproject.toml. .ci/run
# has one Python for each minor version.
TESTED = ((0, 10), (0, 13))


def warn_if_untested(version: str = jax.__version__) -> None:
    """Logs a warning of one line if `version` of JAX is outside the range that was tested.

    It is not an error, because most of what works with one minor version works with the next.
    """
    first, end = TESTED
    if not first <= tuple(map(int, version.split(".")[:2])) < end:
        shown = f">={first[0]}.{first[1]},<{end[0]}.{end[1]}"
        LOG.warning("jax %s is untested; if it fails, pip install 'jax%s'", version, shown)


def installed_versions() -> dict[str, str]:
    """Returns the versions of the software that decides the speed."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return packages | {"python": platform.python_version()}


def versions_of_slides() -> dict[str, str | None]:
    """Returns the versions of what reads and scores slides; None for what is not installed."""
    packages = {name: name for name in ("bef_jax", "jax", "tifffile")} | {
        "openslide": "openslide-bin"
    }
    return {name: _version(package) for name, package in packages.items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
