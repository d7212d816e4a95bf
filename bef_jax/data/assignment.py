"""Assigns patches to train, valid and test, for sources that come without splits.

The result depends on the set of patches, not on the order in which a source lists them.
"""

import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bef_jax.data.patch import READ_ORDER, SPLITS
from bef_jax.errors import UserError, printable

LOG = logging.getLogger(__name__)


def assign_splits(
    ids: Sequence[str],
    labels: np.ndarray,
    groups: Sequence[str] | None,
    ratio: Sequence[float],
    kind: str = "patches",
) -> dict[str, list[int]]:
    """Returns the rows of each split, ascending; its keys are in READ_ORDER.

    Without groups, each class is divided by the ratio, exact to one patch. With groups, all patches
    of a group are in one split, and the shares are as near to the ratio as the groups allow. Train
    has every class.

    Args:
        ids: one for each row, all different.
        labels: integers [N], numbers of classes.
        groups: one for each row; None if they are not known.
        ratio: the shares of train, valid and test; their sum need not be 1.
        kind: what the rows are, for errors.

    Raises:
        UserError: the ratio is wrong or leaves a split empty, or the groups are too few.
    """
    check_ratio(ratio)
    shares = np.asarray(ratio, float) / sum(ratio)
    labels = np.asarray(labels, np.int64)
    if groups is None:
        numbers = _assign_patches(ids, labels, shares)
    else:
        numbers = _assign_groups(groups, labels, shares, kind)
    splits = {
        split: np.flatnonzero(numbers == SPLITS.index(split)).tolist() for split in READ_ORDER
    }
    check_filled(splits, ratio, kind)
    return splits


def check_ratio(ratio: Sequence[float]) -> None:
    """Raises `UserError` unless it has three shares, and those of train and valid are above 0."""
    if len(ratio) != 3 or not all(0 <= x < math.inf for x in ratio) or min(ratio[:2]) == 0:
        raise UserError(
            f"config.data.split_ratio is {tuple(ratio)}; "
            "set the shares of train, valid and test, the first two above 0"
        )


def check_filled(
    splits: Mapping[str, Sequence], ratio: Sequence[float], kind: str = "patches"
) -> None:
    """Raises `UserError` if a split has a share above 0, but nothing of what `kind` names."""
    count = sum(map(len, splits.values()))
    for split, share in zip(SPLITS, ratio, strict=True):
        if share and not splits[split]:
            raise UserError(
                f"config.data.split_ratio leaves none of {count} {kind} for the {split} split; "
                f"give it a larger share, use more {kind}, or set the share of test to 0"
            )


def report_shared(groups_by_split: Mapping[str, Iterable[str]], kind: str = "patches") -> None:
    """Warns if splits that came with the source share groups; a score is then too high.

    Args:
        groups_by_split: the groups of all patches of each split.
        kind: what has these groups, if not patches.
    """
    counts = [Counter(groups) for groups in groups_by_split.values()]
    splits_of = Counter(group for count in counts for group in count)
    shared = [group for group, splits in splits_of.items() if splits > 1]
    if shared:
        LOG.warning(
            "groups that are in more than one split: %d, with %d %s; the first is %s. "
            "Scores are then higher than on new groups",
            len(shared),
            sum(count[group] for count in counts for group in shared),
            kind,
            printable(min(shared)[:100]),
        )


# ---- patch by patch -----------------------------------------------------------------------------


def _assign_patches(ids: Sequence[str], labels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Returns the number of each row's split, int8 [N], with each class divided by the shares."""
    # Cut the patches in the order of a hash. One patch more moves each cut by one place at most, so
    # nearly all other patches stay where they are.
    order = np.lexsort((_hashes(ids), labels))
    counts = [_divide(count, shares) for count in np.bincount(labels).tolist()]
    numbers = np.empty(len(labels), np.int8)
    numbers[order] = np.repeat(np.tile(range(len(SPLITS)), len(counts)), np.ravel(counts))
    return numbers


def _divide(count: int, shares: np.ndarray) -> tuple[int, int, int]:
    """Returns how many of a class's patches train, valid and test get, to one patch.

    The first patch of a rare class is for train, the second for valid, and the third for test.
    """
    test = max(0, min(max(1, round(count * shares[2])), count - 2)) if shares[2] else 0
    valid = min(max(1, round(count * shares[1])), count - 1 - test) if count else 0
    return count - valid - test, valid, test


def _hashes(names: Iterable[str]) -> np.ndarray:
    # Do not use hash(), because Python salts it in each process.
    return np.array([hashlib.sha256(name.encode()).digest() for name in names], "S32")


# ---- group by group -----------------------------------------------------------------------------


class _Group(NamedTuple):
    """How much of all patches a group has.

    Attributes:
        number: of the group.
        size: its patches.
        parts: numbers of the classes that it has, ascending, and then K, which means all classes.
        weights: the share that it has in the patches of each of these parts.
    """

    number: int
    size: int
    parts: np.ndarray
    weights: np.ndarray


def _assign_groups(
    groups: Sequence[str], labels: np.ndarray, shares: np.ndarray, kind: str
) -> np.ndarray:
    """Returns the number of each row's split, int8 [N], with each group in one split."""
    numbers: dict[str, int] = {}
    member = np.fromiter((numbers.setdefault(name, len(numbers)) for name in groups), np.int64)
    hashes = _hashes(numbers)
    by_size = sorted(_count(member, labels), key=lambda x: (-x.size, hashes[x.number]))
    train = _covering(by_size)
    others = [SPLITS[i] for i in (1, 2) if shares[i]]
    if len(by_size) < len(train) + len(others):
        raise UserError(
            f"config.data.group gives {len(by_size)} groups, but train needs {len(train)} to have "
            f"every class, and {' and '.join(others)} one each; use {kind} of more groups"
        )
    split_of = np.zeros(len(by_size), np.int8)
    lacking = np.tile(shares, (labels.max() + 2, 1))
    for group in train.values():
        lacking[group.parts, 0] -= group.weights
    for number, split in _place([x for x in by_size if x.number not in train], lacking, shares):
        split_of[number] = split
    return split_of[member]


def _place(
    groups: Sequence[_Group], lacking: np.ndarray, shares: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yields the number and the split of each group.

    Each goes where the sum of the squares of all that is lacking decreases most. scikit-learn's
    StratifiedGroupKFold also places the large groups first.

    Args:
        lacking: float64 [K + 1, 3], what each split still lacks of its share of each part; changed.
    """
    empty = {split for split in (1, 2) if shares[split]}
    for left, group in zip(range(len(groups), 0, -1), groups, strict=True):
        # The last groups are for splits that would stay empty.
        allowed = sorted(empty) if left == len(empty) else np.flatnonzero(shares).tolist()
        # Half the decrease, up to what is the same for all splits. NumPy sums over the first axis
        # in order, so the result is the same on all machines.
        decrease = (group.weights[:, None] * lacking[group.parts]).sum(axis=0)
        split = max(allowed, key=decrease.__getitem__)
        lacking[group.parts, split] -= group.weights
        empty.discard(split)
        yield group.number, split


def _count(member: np.ndarray, labels: np.ndarray) -> Iterator[_Group]:
    """Yields the groups; `member` int64 [N] has the number of each row's group."""
    parts = labels.max() + 2
    pairs = np.concatenate([member * parts + labels, (member + 1) * parts - 1])
    pairs, counts = np.unique(pairs, return_counts=True)
    number, part = np.divmod(pairs, parts)
    weights = counts / np.bincount(part, counts)[part]
    ends = np.flatnonzero(part == parts - 1) + 1
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        rows = slice(start, end)
        yield _Group(int(number[start]), int(counts[end - 1]), part[rows], weights[rows])


def _covering(groups: Sequence[_Group]) -> dict[int, _Group]:
    """Returns, by number, groups that together have every class: first those with most classes."""
    chosen, seen = {}, set()
    for group in sorted(groups, key=lambda x: -len(x.parts)):
        parts = set(group.parts.tolist())
        if not parts <= seen:
            chosen[group.number] = group
            seen |= parts
    return chosen
