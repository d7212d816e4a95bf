"""Fetches weights from a hub of models: hf:OWNER/REPOSITORY, or hf:OWNER/REPOSITORY@REVISION."""

import logging
from pathlib import Path

from bef_jax import hub
from bef_jax.errors import UserError

LOG = logging.getLogger(__name__)
_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that a repository has is taken


def fetch(name: str) -> Path:
    """Returns the cached file of weights; config.json lies beside it if the repository has one.

    Raises:
        UserError: the hub does not give it, see `hub.asking`; the repository has no weights; or
            the cached copy is damaged.
    """
    with hub.asking(name, instead="a file") as (repository, revision):
        path = _fetch(name, repository, revision)
    hub.check_intact(name, path)
    return path


def _fetch(name: str, repository: str, revision: str | None) -> Path:
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
