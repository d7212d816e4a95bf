"""Weights from a hub of models: hf:OWNER/REPOSITORY, or hf:OWNER/REPOSITORY@REVISION.

huggingface_hub fetches and keeps them: HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file

LOG = logging.getLogger(__name__)
PREFIX = "hf:"
_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that a repository has is taken


def fetch(name: str) -> Path:
    """The file of weights in the cache, with the repository's config.json beside it if it has one.

    Raises:
        UserError: huggingface_hub is not installed; no such repository, revision or file, or no
            leave to read it; the hub can't be reached and the cache lacks it; the download broke
            off; or the cached copy is damaged.
    """
    try:
        import huggingface_hub  # noqa: F401  here: seconds of a start that no other name needs
    except ImportError as error:
        raise UserError(f"{name} takes huggingface_hub: pip install -e '.[hub]'") from error
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        with _quiet():
            path = _fetch(name, repository, revision or None)
    except UserError:
        raise
    # Its HTTP client, its file system and its own checks each have kinds of their own.
    except Exception as error:
        raise UserError(f"{name}: {_reason(error, revision)}") from error
    _check(name, path)
    return path


def _fetch(name: str, repository: str, revision: str | None) -> Path:
    from huggingface_hub import constants

    # Before the first try: it can take half a minute to see that there is no network.
    LOG.info("%s: from %s, or the cache in %s", name, constants.ENDPOINT, constants.HF_HUB_CACHE)
    config = _download(repository, "config.json", revision)
    if config is None:
        LOG.warning("%s has no config.json: its normalisation is not known", name)
    # Of one commit, even if the branch moves on between the two: its folder is named for it.
    commit = config.parent.name if config else revision
    for file in _FILES:
        path = _download(repository, file, commit)
        if path:
            return path
    raise UserError(f"{name} has no weights: neither {' nor '.join(_FILES)}")


def _download(repository: str, file: str, revision: str | None) -> Path | None:
    """The cached file, fetched if need be; None if the repository has no such file."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except errors.RemoteEntryNotFoundError:
        return None
    except errors.LocalEntryNotFoundError:
        # What a repository lacks is in the cache, too: without a network that is an answer.
        known = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if known is huggingface_hub._CACHED_NO_EXIST:
            return None
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of each try, two lines apiece, unless another level was asked for."""
    # Its own module sets the level at its first import, so a level set before would not last.
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    if level == logging.WARNING:
        hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def _check(name: str, path: Path) -> None:
    """Compares the content with its SHA-256, for which the cache names files of some size."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with open_user_file(blob) as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == blob.name
        if not intact:
            raise UserError(f"{name}: {blob} is damaged: delete it, to have it fetched again")


def _reason(error: Exception, revision: str) -> str:
    """One line: what is wrong, and how to fix it."""
    from huggingface_hub import constants, errors

    token = "set HF_TOKEN to a token that may read it"  # noqa: S105
    if isinstance(error, errors.HFValidationError):
        return "write hf:OWNER/REPOSITORY, or hf:OWNER/REPOSITORY@REVISION"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms on its page, and {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one: {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision}"
    local = isinstance(error, errors.LocalEntryNotFoundError)
    if local and constants.HF_HUB_OFFLINE:
        place = constants.HF_HUB_CACHE
        return (
            f"not whole in {place}, and HF_HUB_OFFLINE forbids fetching: unset it, or give a file"
        )
    cause = error.__cause__ if local and error.__cause__ else error
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        return f"{constants.ENDPOINT} answers {status}" + (
            f": {token}" if status in (401, 403) else ""
        )
    if local:
        return (
            f"no network: {constants.ENDPOINT} can't be reached ({reason_of(cause)}); what was "
            "fetched once needs none, and a file can be given instead"
        )
    return f"the download failed, so nothing of it is used ({reason_of(error)}): try again"
