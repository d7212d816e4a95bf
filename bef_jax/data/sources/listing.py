"""What the sources share that list their pictures: checks of splits, classes, groups and tables.

All of it is checked before a picture is decoded, because decoding can take hours.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.assignment import assign_splits, report_shared
from bef_jax.data.patch import SPLITS
from bef_jax.data.sources.description import folder_identity
from bef_jax.errors import UserError, listed, reason_of

# What users call the splits, in lower case.
SPLIT_NAMES = {split: split for split in SPLITS} | {"val": "valid", "validation": "valid"}
MOST_CLASSES = 10_000
_LONGEST_LINE = 1 << 16  # characters of a row of a table


# What decides which patches are read, and into which split, in addition to the folder and sizes.
_FIELDS = ("patch_size", "resize", "mpp", "classes", "group", "split_ratio")


def listed_identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide what is read, for a source that lists."""
    fields = {name: data[name] for name in _FIELDS}
    lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
    return folder_identity(data) | fields | lists


def divide(
    data: ConfigDict,
    ids: Sequence[str],
    labels: np.ndarray,
    groups: Sequence[str] | None,
    given: Mapping[str, Sequence[int]] | None,
    classes: Sequence[str],
    where: str,
) -> Mapping[str, Sequence[int]]:
    """Returns the rows of each split: `given`, which is checked, or else by `data.split_ratio`.

    Args:
        data: config.data.
        ids: one for each row, all different.
        labels: integers [N], numbers of classes.
        groups: one for each row; None if they are not known.
        given: the rows of each split, if the source has splits; else None.
        classes: their names.
        where: the folder or file that has them, for errors.

    Raises:
        UserError: see `assign_splits` and `check_splits`.
    """
    if given is None:
        return assign_splits(ids, labels, groups, data.split_ratio)
    check_splits({split: labels[rows] for split, rows in given.items()}, classes, where)
    if groups is not None:
        report_shared({split: (groups[row] for row in rows) for split, rows in given.items()})
    return given


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
            f"{where}: has {len(found)} classes, and at most {MOST_CLASSES} are read; "
            "put the names of classes where those of patches may be"
        )
    if len(found) < 2:
        raise UserError(
            f"{where}: has {'one class, ' + repr(*found)[:100] if found else 'no class'}; "
            "a network needs two or more to learn"
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
        UserError: train or valid has no patch, or train lacks a class that another split has.
    """
    for split in ("train", "valid"):
        if not len(labels_by_split.get(split, ())):
            raise UserError(
                f"{where}: has no patch of the {split} split; train and valid need some"
            )
    known = np.bincount(labels_by_split["train"], minlength=len(classes)) > 0
    for split in SPLITS[1:]:
        others = np.unique(labels_by_split.get(split, np.zeros(0, int)))
        if len(unknown := others[~known[others]]):
            raise UserError(
                f"{where}: train has no patch of class {classes[unknown[0]]!r:.100}, "
                f"which {split} has; add some, or remove the class"
            )


# ---- groups -------------------------------------------------------------------------------------


def group_finder(pattern: str) -> Callable[[str], str]:
    """Returns a function that finds the group in a picture's path.

    It is what the group named `group` of the regular expression matched, or else its first group,
    or else the whole of it.

    Args:
        pattern: config.data.group.

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
            raise UserError(
                f"config.data.group finds no group in {path[:200]!r}; "
                "change the pattern, or rename the file"
            )
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
