"""What the sources share that list their pictures: checks of splits, classes, groups and tables.

All of it is checked before a picture is decoded, because decoding can take hours.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.assignment import assign_splits, report_shared
from bef_jax.data.chunk import LONGEST_ID
from bef_jax.data.patch import SPLITS
from bef_jax.data.sources.description import ONLY_SAME_FILES, Description, folder_identity
from bef_jax.errors import UserError, listed, reason_of

if TYPE_CHECKING:
    from bef_jax.data.sources.decode import Listed

LOG = logging.getLogger(__name__)

# What users call the splits, in lower case.
SPLIT_NAMES = {split: split for split in SPLITS} | {"val": "valid", "validation": "valid"}
MOST_CLASSES = 10_000
_LONGEST_LINE = 1 << 16  # characters of a row of a table


LISTED = Description(
    shared_slides="not known: config.data.group can say which patches are of one; "
    "if yes, a score is higher than on new slides",
    comparable=ONLY_SAME_FILES,
)
# What decides which patches are read, and into which split, in addition to the folder and sizes.
_FIELDS = ("patch_size", "resize", "mpp", "classes", "group", "split_ratio")


def listed_identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide what is read, for a source that lists."""
    fields = {name: data[name] for name in _FIELDS}
    lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
    return folder_identity(data) | fields | lists


def divide(
    data: ConfigDict,
    pictures: Sequence["Listed"],
    given: Mapping[str, Sequence[int]] | None,
    classes: Sequence[str],
    where: str,
) -> dict[str, list["Listed"]]:
    """Returns the pictures of each split that has any; see `divide_places`."""
    places = divide_places(data, pictures, given, classes, where)
    return {split: [pictures[place] for place in found] for split, found in places.items()}


def divide_places(
    data: ConfigDict,
    pictures: Sequence["Listed"],
    given: Mapping[str, Sequence[int]] | None,
    classes: Sequence[str],
    where: str,
) -> dict[str, Sequence[int]]:
    """Returns, for each split that has any, the places of its pictures.

    Args:
        data: config.data; its `split_ratio` decides if the source has no splits, or no valid.
        pictures: all of the source, in any order.
        given: the places in `pictures` of each split, if the source has splits; else None.
        classes: their names, in the order of their labels.
        where: the folder or file that has them, for errors.

    Raises:
        UserError: an id or group is too long, the given splits are refused by `check_splits`, or
            there can be no splits; see `assign_splits`.
    """
    ids = [picture.id for picture in pictures]
    labels = np.array([picture.label for picture in pictures])
    groups = None if pictures[0].group is None else [picture.group for picture in pictures]
    _check_lengths(ids, "name", where)
    _check_lengths(groups or (), "group", where)
    if given is None:
        given = assign_splits(ids, labels, groups, data.split_ratio)
    else:
        check_splits({split: labels[rows] for split, rows in given.items()}, classes, where)
        if not len(given.get("valid", ())):
            given = with_valid(given, ids, labels, groups, data.split_ratio)
        if groups is not None:
            report_shared({split: [groups[row] for row in rows] for split, rows in given.items()})
    return {
        split: _limited(np.asarray(rows), labels, data[f"{split}_size"])
        for split, rows in given.items()
        if len(rows)
    }


def _limited(rows: np.ndarray, labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Returns at most `limit` of the rows, in their order, with the shares of their classes.

    The first ones of a sorted table would be of one class.
    """
    kept = np.argsort(evenly(labels[rows]), kind="stable")[:limit]
    return rows[np.sort(kept)]


def evenly(labels: np.ndarray) -> np.ndarray:
    """Returns places, float64 [n] in 0 .. 1, at which each class is spread evenly.

    Args:
        labels: integers [n].
    """
    places = np.empty(len(labels))
    places[np.argsort(labels, kind="stable")] = np.concatenate(
        [(np.arange(count) + 0.5) / max(count, 1) for count in np.bincount(labels)]
    )
    return places


def with_valid(
    given: Mapping[str, Sequence[int]],
    ids: Sequence[str],
    labels: np.ndarray,
    groups: Sequence[str] | None,
    ratio: Sequence[float],
    kind: str = "patches",
) -> dict[str, Sequence[int]]:
    """Returns splits in which a part of train is valid, for a source that has only train and test.

    Its share is that of valid in train and valid together. See `assign_splits` for the arguments.
    """
    rows = np.asarray(given["train"])
    of_train = None if groups is None else [groups[row] for row in rows]
    parts = assign_splits(
        [ids[row] for row in rows], labels[rows], of_train, (ratio[0], ratio[1], 0), kind
    )
    train, valid = rows[parts["train"]], rows[parts["valid"]]
    text = "there is no valid split, so %d of the %d %s of train are used as valid"
    LOG.info(text, len(valid), len(rows), kind)
    return {**given, "train": train, "valid": valid}


def _check_lengths(texts: Sequence[str], kind: str, where: str) -> None:
    # Every row of an array of text takes as much memory as the longest one.
    if len(longest := max(texts, key=len, default="")) > LONGEST_ID:
        raise UserError(
            f"{where}: {longest[:100]} is a {kind} of more than {LONGEST_ID} characters; shorten it"
        )


def split_folders(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Returns the folder of each split; nothing if no name is that of a split.

    Raises:
        UserError: there are other folders beside them, two for one split, or none for train.
    """
    splits: dict[str, str] = {}
    others = [name for name in names if name.lower() not in SPLIT_NAMES]
    for name in names:
        if split := SPLIT_NAMES.get(name.lower()):
            if split in splits:
                raise UserError(
                    f"{root / name}: {splits[split]} is the {split} split, too; join them"
                )
            splits[split] = name
    if splits and others:
        raise UserError(
            f"{root / others[0]}: is beside {listed(list(splits.values()))}, which are splits; "
            "move it into a split, or give other names to these if they are none"
        )
    if splits and "train" not in splits:
        raise UserError(f"{root}: has {listed(list(splits.values()))}, but no folder train; add it")
    return splits


# ---- classes ------------------------------------------------------------------------------------


def order_classes(found: Collection[str], wanted: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns the names of the classes in the order of their labels: `wanted`, or else sorted.

    Names that are all whole numbers are sorted as numbers.

    Args:
        found: the classes of the source, each once.
        wanted: config.data.classes.
        where: the folder or file that has them, for errors.

    Raises:
        UserError: there are less than 2 or more than 10,000, or `wanted` has others.
    """
    if len(found) > MOST_CLASSES:
        raise UserError(
            f"{where}: has {len(found)} classes, but {MOST_CLASSES} are the most; "
            "names of patches may stand where classes should"
        )
    if not found:
        raise UserError(f"{where}: holds no patch; set config.data.dir to another place")
    if len(found) == 1:
        raise UserError(
            f"{where}: all patches are of class {next(iter(found))[:100]!r}; "
            "add patches of another class"
        )
    if not wanted:
        return tuple(sorted(found, key=_sort_key(found)))
    _check_wanted(found, wanted, where)
    return tuple(wanted)


def _sort_key(names: Collection[str]) -> Callable[[str], tuple]:
    # Longer ones are not numbers of classes, and Python refuses to parse very long ones.
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return lambda name: (int(name), name)
    return lambda name: (name,)


def _check_wanted(found: Collection[str], wanted: Sequence[str], where: str) -> None:
    if len(set(wanted)) < len(wanted):
        raise UserError(f"config.data.classes names a class twice: {listed(list(wanted))}")
    for name in wanted:
        if name not in found:
            raise UserError(
                f"config.data.classes has {name!r:.100}, but {where} does not; "
                f"it has {listed(sorted(found))}"
            )
    if missing := sorted(set(found) - set(wanted)):
        raise UserError(f"{where}: has classes that config.data.classes lacks: {listed(missing)}")


def check_splits(
    labels_by_split: Mapping[str, np.ndarray], classes: Sequence[str], where: str
) -> None:
    """Checks the splits that came with a source.

    Args:
        labels_by_split: for each split that is there, the labels of its patches, integers [n].
        classes: their names.
        where: the folder or file that has them, for errors.

    Raises:
        UserError: train has no patch, or lacks a class that another split has.
    """
    if not len(labels_by_split.get("train", ())):
        raise UserError(f"{where}: has no patch of the train split; add some")
    known = np.bincount(labels_by_split["train"], minlength=len(classes)) > 0
    for split in SPLITS[1:]:
        others = np.unique(labels_by_split.get(split, np.zeros(0, int)))
        if len(unknown := others[~known[others]]):
            raise UserError(
                f"{where}: train has no patch of class {classes[unknown[0]]!r:.100}, "
                f"which {split} has; add some, or remove the class"
            )


# ---- groups -------------------------------------------------------------------------------------


_RENAME = "change the pattern, or rename the file"


def group_finder(pattern: str, fix: str = _RENAME) -> Callable[[str], str]:
    """Returns a function that finds the group in a picture's path.

    It is what the group named `group` of the regular expression matched, or else its first group,
    or else the whole of it.

    Args:
        pattern: config.data.group.
        fix: what a user can do about a path without a group; it becomes the end of the error.

    Raises:
        UserError: `pattern` is no regular expression; the function raises it if a path has no
            group.
    """
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"config.data.group is not a regular expression ({reason_of(error)}); "
            r"write one such as '(?P<group>P\d+)_'"
        ) from error
    part = "group" if "group" in expression.groupindex else min(expression.groups, 1)

    def find(path: str) -> str:
        match = expression.search(path)
        if not match or not match[part]:
            raise UserError(f"config.data.group={pattern} finds no group in {path[:200]!r}; {fix}")
        return match[part]

    return find


# ---- tables ---------------------------------------------------------------------------


def table_lines(text: TextIO, table: Path) -> Iterator[str]:
    """Yields the lines of a table.

    Raises:
        UserError: a line has more than 65,536 characters.
    """
    # csv would read a line of any length before it looks at the fields.
    while line := text.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise UserError(
                f"{table}: has a line of more than {_LONGEST_LINE} characters; fetch it again"
            )
        yield line
