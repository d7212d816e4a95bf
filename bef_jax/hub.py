"""Asks a hub for models and data sets: hf:OWNER/NAME, or hf:OWNER/NAME@REVISION.

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


@contextlib.contextmanager
def asking(name: str, instead: str) -> Iterator[tuple[str, str | None]]:
    """Yields the repository and the revision of a name, for a body that calls huggingface_hub.

    Args:
        name: hf:OWNER/NAME, or hf:OWNER/NAME@REVISION.
        instead: what a user can give without a hub, such as "a file".

    Raises:
        UserError: huggingface_hub is not installed; the repository, revision or file is not there,
            or may not be read; the hub can't be reached and the cache lacks a file; or the
            download broke off.
    """
    try:
        import huggingface_hub  # noqa: F401  imported here, because it takes seconds
        from huggingface_hub import constants
    except ImportError as error:
        raise UserError(f"{name} needs huggingface_hub: {install_command('hub')}") from error
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    # Logged before the first try, because it can take half a minute to see a missing network.
    LOG.info("looking for %s in %s and in %s", name, constants.ENDPOINT, constants.HF_HUB_CACHE)
    try:
        with _quiet():
            yield repository, revision or None
    except UserError:
        raise
    # The library's HTTP client, its file access and its checks each raise types of their own.
    except Exception as error:
        raise UserError(f"{name}: {_reason(error, revision, instead)}") from error


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


def check_intact(name: str, path: Path) -> None:
    """Compares a cached file with its SHA-256, which the cache uses as a large file's name.

    Raises:
        UserError: it is damaged; names `name`.
    """
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with open_user_file(blob) as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == blob.name
        if not intact:
            raise UserError(f"{name}: {blob} is damaged: delete it, so that it is fetched again")


def _reason(error: Exception, revision: str, instead: str) -> str:
    """Returns the rest of a line after the name: what is wrong, and how to fix it."""
    from huggingface_hub import constants, errors

    token = "set HF_TOKEN to a token that may read it"  # noqa: S105
    if isinstance(error, errors.HFValidationError):
        return "write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"
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
            f"incomplete in {place}, and HF_HUB_OFFLINE forbids fetching: unset it, or give "
            f"{instead}"
        )
    cause = error.__cause__ if local and error.__cause__ else error
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        return f"{constants.ENDPOINT} answers {status}" + (
            f": {token}" if status in (401, 403) else ": try again later"
        )
    if local:
        return (
            f"no network: {constants.ENDPOINT} can't be reached ({reason_of(cause)}); "
            f"use what was fetched before, or give {instead}"
        )
    return f"the download failed, so no part of it is used ({reason_of(error)}): try again"
