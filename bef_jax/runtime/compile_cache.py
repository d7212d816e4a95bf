"""Compiled programs are kept between runs, so that only the first run waits for the compiler."""

import logging
import os
import tempfile
from pathlib import Path

import jax

from bef_jax.errors import UserError
from bef_jax.runtime import devices
from bef_jax.runtime.files import user_path

LOG = logging.getLogger(__name__)

# JAX keeps what took a second. Reading an entry back takes milliseconds, and the many small
# programs of a start add up.
_LEAST_SECONDS = 0.1


def enable(setting: str) -> None:
    """Tells JAX where compiled programs are kept; call it before anything is compiled.

    Where JAX_COMPILATION_CACHE_DIR is set, it decides. A folder that can't be written is one line
    of warning: without a cache a run is slower, and as good.

    A home folder that unlike machines share is safe: the key of an entry holds, besides the program
    and jaxlib's version, a fingerprint of the devices, and for a CPU that covers the instructions
    it has. So no other machine's code is loaded. The key leaves out how many cores there are, by
    which loops are cut into parts, hence a folder for each number: compiled for one core, a program
    would stay on one.

    Args:
        setting: `config.compile_cache`: auto, a folder, or empty for none.
    """
    # The variable is the user's own word to JAX: a launcher's, say, with a folder for all runs.
    if not setting or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        folder = _default_folder() if setting == "auto" else user_path(setting)
        folder /= f"cores_{devices.cores()}"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone don't tell: quota, read-only
    # RuntimeError: a user without a home.
    except (OSError, RuntimeError, UserError) as error:
        LOG.warning("config.compile_cache: compiled programs can't be kept: %s", error)
        return
    # In code, not by a variable: JAX read those when it was imported.
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bef_jax"
