"""The sources of patches, by name: each is read once, into a store."""

import importlib
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from bef_jax.data.chunk import Begin, Contents, silent
from bef_jax.data.patch import PCAM_CLASSES, PCAM_SIDE, SPLITS
from bef_jax.data.sources.description import Description
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path

# Modules of this package, each with `open_source`, `identity` and DESCRIPTION. Their functions
# import the libraries that read files, because together these take 0.3 s, and a run whose store
# exists needs none of them.
SOURCES = (
    *("pcam_hdf5", "rpcam", "npz", "tfds", "image_folder", "csv", "parquet", "slides"),
    "synthetic",
)
_OF_PICTURES = ("image_folder", "csv", "parquet")
_PCAM_ONLY = ("pcam_hdf5", "rpcam", "tfds", "synthetic")
# Fields with the value that they have where they mean nothing, and the sources that have them. The
# fields slide_mpp and slide_center are not here, because they follow others.
_OF_SOURCES = {
    "resize": ("none", _OF_PICTURES),
    "group": ("", (*_OF_PICTURES, "slides")),
    "annotations": ("", ("slides",)),
    "slide_patches": (20_000, ("slides",)),
}


def check(data: ConfigDict) -> None:
    """Checks the fields of `config.data` that decide what is read.

    Raises:
        UserError: an unknown source, a split size below 1, or a field that is not for the source.
    """
    if data.source not in SOURCES:
        raise UserError(
            f"config.data.source: unknown source {data.source!r}; one of {', '.join(SOURCES)}"
        )
    for split in SPLITS:
        size = data[f"{split}_size"]
        if size is not None and size < 1:
            raise UserError(f"config.data.{split}_size is {size}; set 1 or more, or leave it empty")
    _check_kind(data)


def _check_kind(data: ConfigDict) -> None:
    """Checks the fields that say of which kind the patches are."""
    for name, (default, found) in _OF_SOURCES.items():
        if data.source not in found and data[name] != default:
            raise UserError(
                f"config.data.{name} is for the source{'s' * (len(found) > 1)} {', '.join(found)}, "
                f"and not for {data.source}; leave it out"
            )
    if data.source in _PCAM_ONLY and data.patch_size != PCAM_SIDE:
        raise UserError(
            f"config.data.patch_size is {data.patch_size}, but the patches of {data.source} are "
            f"{PCAM_SIDE}x{PCAM_SIDE}; leave it out"
        )
    count, has_two = len(data.classes), data.source in (*_PCAM_ONLY, "slides")
    if has_two and count not in (0, len(PCAM_CLASSES)):
        raise UserError(
            f"config.data.classes has {count} names, but {data.source} has 2 classes; give 2"
        )
    if has_two and tuple(data.classes) == PCAM_CLASSES[::-1]:
        raise UserError(
            f"config.data.classes: label 0 of {data.source} is normal, 1 metastasis; leave it out"
        )
    if count == 1 or len(set(data.classes)) < count:
        raise UserError(
            f"config.data.classes={tuple(data.classes)}: give two names or more, each once, "
            "such as ('benign', 'malignant')"
        )


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


def home(data: ConfigDict) -> Path:
    """Returns the folder in which the store is made by default."""
    module = _module(data.source)
    return module.home(data) if hasattr(module, "home") else user_path(data.dir)


def describe(source: str) -> Description:
    """Returns what a reader should know about the patches of a source."""
    return _module(source).DESCRIPTION


def scale(data: ConfigDict) -> float | None:
    """Returns the micrometres per pixel of the patches, or None if neither says them."""
    return data.mpp or describe(data.source).mpp


def _module(source: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{source}")
