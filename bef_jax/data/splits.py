"""The splits that a run trains and evaluates on, opened and checked before the first step."""

import logging
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data import store
from bef_jax.data.patch import SPLITS
from bef_jax.data.prepare import prepare_with_progress
from bef_jax.data.store import Split
from bef_jax.errors import UserError

LOG = logging.getLogger(__name__)


def open_splits(data: ConfigDict) -> dict[str, Split]:
    """Prepares the store of config.data unless it exists, and returns its open splits by name.

    Raises:
        UserError: see `store.prepare`, `store.open_split` and `check_classes`.
    """
    counts = prepare_with_progress(data)["counts"]
    folder = store.store_path(data)
    # A source may have no test split.
    splits = {name: store.open_split(folder, name) for name in SPLITS if counts.get(name)}
    check_classes(splits)
    return splits


def check_classes(splits: Mapping[str, Split]) -> None:
    """Logs how many patches of each class the splits have, and warns of splits with one class.

    Raises:
        UserError: the training split has only one class.
    """
    for name, split in splits.items():
        normal, metastasis = np.bincount(split.labels, minlength=2)
        text = f"{name} split: {normal:,} normal, {metastasis:,} metastasis"
        LOG.info("%s", text)
        if normal and metastasis:
            continue
        if name == "train":
            raise UserError(
                f"config.data: {text}: a network learns nothing from one class; give it both"
            )
        warn_of_one_class(name, split.labels)


def warn_of_one_class(split: str, labels: np.ndarray) -> None:
    """Warns which figures have no meaning if all patches of a split are of one class."""
    found = np.unique(labels)
    if len(found) == 1:
        LOG.warning(
            "%s: all %d patches are of class %d, so AUC and average precision have no meaning and "
            "are null; so are a temperature and a threshold chosen on it",
            split, len(labels), found[0],
        )  # fmt: skip
