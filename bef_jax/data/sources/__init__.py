"""The sources of patches, by name: each is read once, into a store."""

import importlib
from types import ModuleType

from ml_collections import ConfigDict

from bef_jax.data.chunk import Begin, Contents, silent
from bef_jax.data.patch import SPLITS
from bef_jax.data.sources.description import Description
from bef_jax.errors import UserError

# Modules of this package, each with `open_source`, `identity` and DESCRIPTION. Their functions
# import the libraries that read files, because together these take 0.3 s, and a run whose store
# exists needs none of them.
SOURCES = ("pcam_hdf5", "rpcam", "npz", "tfds", "synthetic")


def check(data: ConfigDict) -> None:
    """Checks the fields of `config.data` that decide what is read.

    Raises:
        UserError: an unknown source, or a split size below 1.
    """
    if data.source not in SOURCES:
        raise UserError(
            f"config.data.source: unknown source {data.source!r}; one of {', '.join(SOURCES)}"
        )
    for split in SPLITS:
        size = data[f"{split}_size"]
        if size is not None and size < 1:
            raise UserError(f"config.data.{split}_size is {size}; set 1 or more, or leave it empty")


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens `config.data.source`, whose patches are then read chunk by chunk.

    Args:
        data: config.data.
        begin: is called for each long piece of work, such as reading a split, to show its progress.

    Raises:
        UserError: a field, file, image or label is wrong; also while the chunks are read.
    """
    check(data)
    return _module(data.source).open_source(data, begin)


def identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide which patches the source holds.

    They include `dir` if the source reads a folder.
    """
    return _module(data.source).identity(data)


def describe(source: str) -> Description:
    """Returns what a reader should know about the patches of a source."""
    return _module(source).DESCRIPTION


def _module(source: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{source}")
