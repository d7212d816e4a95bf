"""The manifest of a store: what it holds, and from what it was made.

A manifest may come from a stranger, so all of it is checked before it is used.
"""

from pathlib import Path
from typing import Any

import numpy as np

from bef_jax.data import sources
from bef_jax.data.patch import PCAM_CLASSES, PCAM_SIDE, SPLITS
from bef_jax.errors import UserError
from bef_jax.runtime.files import check_types, read_json

FORMAT_VERSION = 2  # a store of a later version is refused
# Version 1 held PCam's patches only. These are the fields that it lacks.
_SINCE_2 = {"classes": list(PCAM_CLASSES), "patch_size": PCAM_SIDE, "groups": None}
MANIFEST = "manifest.json"


def read_manifest(path: Path) -> dict:
    """Returns the manifest of the store at `path`.

    Raises:
        UserError: there is no store, or its manifest is damaged or has another format version.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = read_json(file, _check_manifest, f"delete {path} and run --mode=prepare again")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no store there; run --mode=prepare first") from error
    version = manifest["format_version"]
    if version not in (1, FORMAT_VERSION):
        raise UserError(
            f"{path}: has store format {version}, but this version reads "
            f"{FORMAT_VERSION}; run --mode=prepare with another config.data.store"
        )
    if version == 1:
        manifest = {**_SINCE_2, "mpp": sources.describe(manifest["source"]).mpp} | manifest
    return manifest


def arrays(manifest: dict) -> tuple[str, ...]:
    """Returns the names of the arrays of each split."""
    return ("images", "labels", "ids") + (("groups",) if manifest["groups"] else ())


def _check_manifest(manifest: Any) -> None:
    """Raises ValueError, KeyError or TypeError if it is not as `prepare` writes it."""
    check_types(manifest, format_version=int)
    if manifest["format_version"] not in (1, FORMAT_VERSION):
        return  # another version may have other fields
    check_types(manifest, source=str, library_version=str, config=dict, counts=dict)
    check_types(manifest, class_counts=dict, duplicates=dict, files=dict)
    if manifest["source"] not in sources.SOURCES:
        raise ValueError(f"source {manifest['source']}")
    if not isinstance(manifest["config"].get("dir", ""), str):
        raise TypeError("config.dir is not text")
    if manifest["format_version"] == FORMAT_VERSION:
        _check_kind(manifest)
    check_types(manifest["counts"], **dict.fromkeys(SPLITS, int))
    check_types(manifest["class_counts"], **dict.fromkeys(SPLITS, list))
    check_types(manifest["duplicates"], dropped_within=dict, dropped_across=dict)
    check_types(manifest["duplicates"], conflicting_labels=int, conflicts=list)
    check_types(manifest["content"], total=str)
    for entry in manifest["files"].values():
        check_types(entry, bytes=int, sha256=str)
    for split, count in manifest["counts"].items():
        _check_split(manifest, split, count)


def _check_kind(manifest: dict) -> None:
    """Checks what says of which kind the patches are."""
    check_types(manifest, classes=list, patch_size=int)
    classes, mpp, groups = (manifest[name] for name in ("classes", "mpp", "groups"))
    if len(classes) < 2 or not all(type(name) is str for name in classes):
        raise TypeError("classes are not two texts or more")
    if mpp is not None and not (isinstance(mpp, float) and 0 < mpp < np.inf):
        raise TypeError("mpp is not a number above 0")
    if groups is not None:
        check_types(groups, shared=int, **dict.fromkeys(SPLITS, int))


def _check_split(manifest: dict, split: str, count: int) -> None:
    wanted, classes = len(manifest.get("classes", PCAM_CLASSES)), manifest["class_counts"][split]
    if not all(type(number) is int for number in classes) or len(classes) != wanted:
        raise TypeError(f"class_counts of {split} are not {wanted} numbers")
    for dropped in ("dropped_within", "dropped_across"):
        check_types(manifest["duplicates"][dropped], **{split: int})
    names = [f"{split}/{name}.npy" for name in arrays(_SINCE_2 | manifest)] if count else []
    for name in names:
        # An empty file holds no array. A link to a file of the system would pass as one of size 0:
        # some report this size, but never end.
        if manifest["files"][name]["bytes"] < 1:
            raise ValueError(f"{name} is empty")
