"""Fetches weights from a hub of models: hf:OWNER/REPOSITORY, or hf:OWNER/REPOSITORY@REVISION.

huggingface_hub downloads and caches them. It obeys HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from bef_jax.errors import UserError, install_command, reason_of
from bef_jax.runtime.files import open_user_file

LOG = logging.getLogger(__name__)
PREFIX = "hf:"
_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that a repository has is taken


def fetch(name: str) -> Path:
    """Returns the cached file of weights; config.json lies beside it if the repository has one.

    Raises:
        UserError: huggingface_hub is not installed; the repository, revision or file is not there,
            or may not be read; the hub can't be reached and the cache lacks the file; the
            download broke off; or the cached copy is damaged.
    """
    try:
        import huggingface_hub  # noqa: F401  imported here, because it takes seconds
    except ImportError as error:
        raise UserError(f"{name} needs huggingface_hub: {install_command('hub')}") from error
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        with _quiet():
            path = _fetch(name, repository, revision or None)
    except UserError:
        raise
    # The library's HTTP client, its file access and its checks each raise types of their own.
    except Exception as error:
        raise UserError(f"{name}: {_reason(error, revision)}") from error
    _check(name, path)
    return path


def _fetch(name: str, repository: str, revision: str | None) -> Path:
    from huggingface_hub import constants

    # Logged before the first try, because it can take half a minute to see a missing network.
    LOG.info("looking for %s in %s and in %s", name, constants.ENDPOINT, constants.HF_HUB_CACHE)
    config = _download(repository, "config.json", revision)
    if config is None:
        LOG.warning("%s has no config.json: set config.augment.mean and std yourself", name)
    # Both files come from one commit, even if the branch moves on between the two downloads. The
    # cache names a file's folder after the commit.
    commit = config.parent.name if config else revision
    for file in _FILES:
        path = _download(repository, file, commit)
        if path:
            return path
    raise UserError(
        f"{name} has no weights: neither {' nor '.join(_FILES)}; name another repository"
    )


def _download(repository: str, file: str, revision: str | None) -> Path | None:
    """Returns the cached file, fetched if necessary; None if the repository has no such file."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except errors.RemoteEntryNotFoundError:
        return None
    except errors.LocalEntryNotFoundError:
        # The cache also records which files a repository lacks, so this needs no network.
        known = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if known is huggingface_hub._CACHED_NO_EXIST:
            return None
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the two lines of warnings at each retry, unless the user set another level."""
    # The first import of the package sets the level, so import it before the level is changed.
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    if level == logging.WARNING:
        hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def _check(name: str, path: Path) -> None:
    """Compares a large file with its SHA-256, which the cache uses as the file's name."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with open_user_file(blob) as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == blob.name
        if not intact:
            raise UserError(f"{name}: {blob} is damaged: delete it, so that it is fetched again")


def _reason(error: Exception, revision: str) -> str:
    """Returns the rest of a line after the name: what is wrong, and how to fix it."""
    from huggingface_hub import constants, errors

    token = "set HF_TOKEN to a token that may read it"  # noqa: S105
    if isinstance(error, errors.HFValidationError):
        return "write hf:OWNER/REPOSITORY, or hf:OWNER/REPOSITORY@REVISION"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms on its page, and {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one: {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision or constants.DEFAULT_REVISION}; give another after @"
    local = isinstance(error, errors.LocalEntryNotFoundError)
    if local and constants.HF_HUB_OFFLINE:
        place = constants.HF_HUB_CACHE
        return (
            f"incomplete in {place}, and HF_HUB_OFFLINE forbids fetching: unset it, or give a file"
        )
    cause = error.__cause__ if local and error.__cause__ else error
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        return f"{constants.ENDPOINT} answers {status}" + (
            f": {token}" if status in (401, 403) else ": try again later"
        )
    if local:
        return (
            f"no network: {constants.ENDPOINT} can't be reached ({reason_of(cause)}); use "
            "weights that were fetched before, or give a file"
        )
    return f"the download failed, so no part of it is used ({reason_of(error)}): try again"
