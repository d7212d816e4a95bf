"""Keeps compiled programs between runs, so that only the first run waits for the compiler."""

import logging
import os
import tempfile
from pathlib import Path

import jax

from bef_jax.errors import UserError
from bef_jax.runtime import devices
from bef_jax.runtime.files import user_path

LOG = logging.getLogger(__name__)

# By default JAX keeps only programs that took a second to compile. The many small programs of a
# start add up, and reading one takes milliseconds, so quicker ones are kept too.
_LEAST_SECONDS = 0.1


def enable(setting: str) -> None:
    """Tells JAX where to keep compiled programs; call it before anything is compiled.

    If JAX_COMPILATION_CACHE_DIR is set, or JAX has a folder already, that decides. If the folder
    can't be written, this logs one warning, because without a cache a run is only slower.

    Machines of different kinds can share a home folder safely. The key of an entry holds the
    program, jaxlib's version and a fingerprint of the devices. For a CPU the fingerprint covers its
    instructions, so no other machine's code is loaded. The key does not hold the number of cores,
    but XLA cuts loops into that many parts. So each number of cores has its own folder, because a
    program that was compiled for one core would always use one.

    Args:
        setting: `config.compile_cache`: auto, a folder, or empty for none.
    """
    # JAX has a folder already if the variable is set, such as a launcher's folder for all runs, or
    # if the program that calls `bef_jax.load` chose one.
    if not setting or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = _default_folder() if setting == "auto" else user_path(setting)
        folder /= f"cores_{devices.cores()}"
        folder.mkdir(parents=True, exist_ok=True)
        # Try to write, because permissions do not show a full quota or a read-only disk.
        tempfile.TemporaryFile(dir=folder).close()
    # RuntimeError means that the user has no home folder.
    except (OSError, RuntimeError, UserError) as error:
        LOG.warning("config.compile_cache: compiled programs can't be kept: %s", error)
        return
    # Set these in code, because JAX read its variables when it was imported.
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bef_jax"
