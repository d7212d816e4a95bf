"""Divides the slides into splits, and says how many patches each split draws."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.assignment import assign_splits, check_ratio, report_shared
from bef_jax.data.patch import READ_ORDER, SPLITS
from bef_jax.data.sources.listing import with_valid
from bef_jax.data.sources.slides.survey import Survey
from bef_jax.errors import UserError


def divide(data: ConfigDict, surveys: Sequence[Survey]) -> dict[str, list[Survey]]:
    """Returns the slides of each split, in READ_ORDER: by their folders, or by split_ratio.

    Slides with and without tumour are spread over the splits. If config.data.group is set, a group
    is in one split.

    Raises:
        UserError: a split would have no slide, or train lacks a class.
    """
    names = [each.found.name for each in surveys]
    labels = np.array([each.counts[1] > 0 for each in surveys], int)
    groups = [each.found.group for each in surveys] if data.group else None
    if surveys[0].found.split is None:
        rows = assign_splits(names, labels, groups, data.split_ratio, "slides")
    else:
        splits = np.array([each.found.split for each in surveys])
        rows = {split: np.flatnonzero(splits == split) for split in SPLITS if split in splits}
        if "train" in rows and "valid" not in rows:
            rows = with_valid(rows, names, labels, groups, data.split_ratio, "slides")
        if groups:
            report_shared(
                {k: [groups[row] for row in found] for k, found in rows.items()}, "slides"
            )
    found = {
        split: [surveys[row] for row in rows[split]]
        for split in READ_ORDER
        if len(rows.get(split, ()))
    }
    # Slides whose tumour no annotation shows were left out; they may be all of train.
    _check_train(data, found.get("train", ()))
    return found


def _check_train(data: ConfigDict, surveys: Sequence[Survey]) -> None:
    for label, name in enumerate(("normal tissue", "tumour")):
        if not any(each.counts[label] for each in surveys):
            raise UserError(
                f"{data.dir}: no slide of train has {name}; put another slide into train, or add "
                "slides"
            )


def quotas(data: ConfigDict, splits: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Returns how many patches of each class a split draws: normal, and with tumour.

    Args:
        data: config.data. Its `slide_patches` are divided by `split_ratio`, and then limited by
            `train_size` and the like.
        splits: that have slides.

    Raises:
        UserError: a split has no share.
    """
    check_ratio(data.split_ratio)
    shares = {split: data.split_ratio[SPLITS.index(split)] for split in splits}
    found = {}
    for split, share in shares.items():
        count = round(data.slide_patches * share / sum(shares.values()))
        limit = data[f"{split}_size"]
        count = count if limit is None else min(count, limit)
        if count < 2:
            raise UserError(
                f"config.data: {count} patches for the {split} split; set a larger share of "
                f"split_ratio, slide_patches or {split}_size"
            )
        found[split] = (count - count // 2, count // 2)
    return found
