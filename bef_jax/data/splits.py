"""The splits that a run trains and evaluates on, opened and checked before the first step."""

import copy
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data import sources, store
from bef_jax.data.patch import PCAM_CLASSES, SPLITS, same_scale
from bef_jax.data.prepare import prepare_with_progress
from bef_jax.data.store import Split
from bef_jax.errors import UserError, printable

LOG = logging.getLogger(__name__)
_LISTED = 10  # names of classes in a message; there may be thousands


def open_splits(config: ConfigDict) -> tuple[ConfigDict, dict[str, Split]]:
    """Prepares the store of config.data unless it exists, and opens its splits.

    Returns:
        The configuration, which names the classes and the scale of the store, so that a checkpoint
        knows them; and the splits by name.

    Raises:
        UserError: see `store.prepare`, `store.open_split`, `check_store` and `check_classes`.
    """
    manifest = prepare_with_progress(config.data)
    check_store(config, manifest, config.data.classes)
    folder = store.store_path(config.data)
    # A source may have no test split.
    splits = {
        name: store.open_split(folder, name) for name in SPLITS if manifest["counts"].get(name)
    }
    check_classes(splits)
    return _with_facts(config, manifest), splits


def _with_facts(config: ConfigDict, manifest: Mapping) -> ConfigDict:
    # PCam's names and scale are known without a store, so its runs are saved as they always were.
    config = copy.deepcopy(config)
    if tuple(manifest["classes"]) != PCAM_CLASSES:
        config.data.classes = tuple(manifest["classes"])
    if manifest["mpp"] and not sources.describe(manifest["source"]).mpp:
        config.data.mpp = manifest["mpp"]
    return config


def check_store(config: ConfigDict, manifest: Mapping, names: Sequence[str]) -> None:
    """Checks that a network of this configuration can learn or score the patches of a store.

    Args:
        config: the whole configuration.
        manifest: of the store.
        names: of the network's classes; empty if it takes them from the store.

    Raises:
        UserError: the store has another number of classes, other classes, another side of patches
            or another scale.
    """
    classes, names = tuple(manifest["classes"]), tuple(names)
    if len(classes) != config.model.num_classes:
        raise UserError(
            f"config.model.num_classes is {config.model.num_classes}, but the data have "
            f"{len(classes)} classes ({_list(classes)}); set --config.model.num_classes="
            f"{len(classes)}"
        )
    # A name at two places would turn labels around, without any other sign of it.
    if any(name in classes and name != classes[number] for number, name in enumerate(names)):
        raise UserError(
            f"the network's classes are {_list(names)}, but the labels of the store mean "
            f"{_list(classes)}; prepare another store, with the classes in the order of the network"
        )
    if names and set(names) != set(classes):
        LOG.warning(
            "the store's classes are called %s, and not %s; they are compared by their numbers",
            _list(classes), _list(names),
        )  # fmt: skip
    if manifest["patch_size"] != config.data.patch_size:
        raise UserError(
            f"config.data.patch_size is {config.data.patch_size}, but the store has patches of "
            f"{manifest['patch_size']} pixels; make another one"
        )
    mpp, own = config.data.mpp, manifest["mpp"]
    if mpp and own and not same_scale(mpp, own):
        raise UserError(
            f"config.data.mpp is {mpp}, but the store has {own} micrometres per pixel; resample "
            "its patches (config.data.resize=mpp)"
        )


def _list(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _LISTED else ""
    return printable(", ".join(names[:_LISTED])) + more


def check_classes(splits: Mapping[str, Split]) -> None:
    """Logs how many patches of each class the splits have, and warns of splits with one class.

    Raises:
        UserError: the training split has only one class, or lacks one that another split has.
    """
    for name, split in splits.items():
        counts = np.bincount(split.labels, minlength=len(split.classes))
        # A number as a name would look like a second count.
        of = " of " if all(label.isdigit() for label in split.classes) else " "
        listed = [f"{n:,}{of}{label}" for n, label in zip(counts, split.classes, strict=True)]
        text = f"{name} split: {_list(listed)}"
        LOG.info("%s", text)
        if name == "train":
            _check_trainable(text, counts, splits)
        elif np.count_nonzero(counts) == 1:
            warn_of_one_class(name, split.labels)
        elif not counts.all():
            LOG.warning("%s: the figures of a class without patches are null", text)


def _check_trainable(text: str, counts: np.ndarray, splits: Mapping[str, Split]) -> None:
    if np.count_nonzero(counts) == 1:
        raise UserError(
            f"config.data: {text}: a network learns nothing from one class; give it both"
        )
    for name, split in splits.items():
        only_there = np.setdiff1d(split.labels, np.flatnonzero(counts))
        if only_there.size:
            label = printable(split.classes[only_there[0]])
            raise UserError(
                f"config.data: {label} is in the {name} split but not in train: a network cannot "
                "learn it; give train some of its patches, or leave the class out"
            )


def warn_of_one_class(split: str, labels: np.ndarray) -> None:
    """Warns which figures have no meaning if all patches of a split are of one class."""
    found = np.unique(labels)
    if len(found) == 1:
        LOG.warning(
            "%s: all %d patches are of class %d, so AUC and average precision have no meaning and "
            "are null; so are a temperature and a threshold chosen on it",
            split, len(labels), found[0],
        )  # fmt: skip
