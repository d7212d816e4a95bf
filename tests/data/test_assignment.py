"""Which patch goes to which split: compared with the promises, for random sets of patches."""

import itertools
import logging
import subprocess
import sys
import time

import numpy as np
import pytest

from bef_jax.data.assignment import assign_splits, report_shared
from bef_jax.data.patch import SPLITS
from bef_jax.errors import UserError
from tests.data.conftest import expect_error

RATIOS = [(0.8, 0.1, 0.1), (0.7, 0.3, 0), (0.1, 0.1, 0.8), (2, 1, 1), (1 / 3, 1 / 3, 1 / 3)]


def names(count):
    return [f"folder/patch {row}.png" for row in range(count)]


def by_id(ids, splits):
    return {ids[row]: split for split, rows in splits.items() for row in rows}


def shuffled(rng, ids, labels, groups=None):
    order = rng.permutation(len(ids))
    return (
        [ids[row] for row in order],
        labels[order],
        groups and [groups[row] for row in order],
    )


def random_groups(rng, count, classes):
    """Returns labels and groups of very different sizes, many of which lack most classes."""
    sizes = rng.lognormal(0, 1.5, count)
    mixes = rng.dirichlet(np.full(classes, 0.3), count)
    members = np.concatenate([np.arange(count), rng.choice(count, 2000, p=sizes / sizes.sum())])
    labels = np.array([rng.choice(classes, p=mixes[member]) for member in members])
    return labels, [f"P{member}" for member in members]


@pytest.mark.parametrize("ratio", RATIOS)
def test_each_class_is_divided_to_one_patch_and_rare_ones_are_spread(ratio):
    counts = [1, 2, 3, 4, 5, 9, 10, 11, 57, 100, 1003]
    labels = np.repeat(np.arange(len(counts)), counts)
    splits = assign_splits(names(len(labels)), labels, None, ratio)
    assert list(splits) == ["test", "valid", "train"]
    assert sorted(itertools.chain(*splits.values())) == list(range(len(labels)))
    assert all(rows == sorted(rows) for rows in splits.values())
    for label, count in enumerate(counts):
        found = [int(np.sum(labels[splits[name]] == label)) for name in ("train", "valid", "test")]
        wanted = count * np.array(ratio) / sum(ratio)
        open_splits = [n for n, share in zip(found, ratio, strict=True) if share]
        assert sum(n > 0 for n in open_splits) == min(count, len(open_splits))
        assert open_splits == sorted(open_splits, reverse=True) or count > 2
        if wanted[wanted > 0].min() >= 1:
            assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_the_rows_changes_nothing(grouped, ratio):
    rng = np.random.default_rng(0)
    for classes in (2, 5):
        labels, groups = random_groups(rng, 60, classes)
        groups = groups if grouped else None
        ids = names(len(labels))
        expected = by_id(ids, assign_splits(ids, labels, groups, ratio))
        for _ in range(3):
            other = shuffled(rng, ids, labels, groups)
            assert by_id(other[0], assign_splits(*other, ratio)) == expected


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("classes", [2, 3, 9])
def test_no_group_is_on_two_sides_and_train_has_every_class(classes, ratio):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels, groups = random_groups(rng, int(rng.integers(2 * classes + 2, 80)), classes)
        splits = assign_splits(names(len(labels)), labels, groups, ratio)
        assert sorted(itertools.chain(*splits.values())) == list(range(len(labels)))
        sides = {name: {groups[row] for row in rows} for name, rows in splits.items()}
        assert sum(map(len, sides.values())) == len(set(groups))
        assert set(labels[splits["train"]].tolist()) == set(labels.tolist())
        assert [len(splits[name]) > 0 for name in SPLITS] == [share > 0 for share in ratio]


def test_300_patients_are_divided_to_one_percent_in_patches_and_classes():
    rng = np.random.default_rng(0)
    sizes, mixes = rng.lognormal(0, 1, 300), rng.beta(1, 1, 300)
    members = rng.choice(300, 19_171, p=sizes / sizes.sum())
    labels = (rng.random(19_171) < mixes[members]).astype(np.uint8)
    groups = [f"patient {member}" for member in members]
    splits = assign_splits(names(19_171), labels, groups, (0.8, 0.1, 0.1))
    for name, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        assert abs(len(splits[name]) / 19_171 - share) < 0.01
        for label in (0, 1):
            of_class = np.flatnonzero(labels == label)
            assert abs(np.isin(of_class, splits[name]).mean() - share) < 0.01


def test_one_more_file_moves_few_others():
    labels = np.arange(5001) % 3
    ids = names(5001)
    before = by_id(ids, assign_splits(ids[:-1], labels[:-1], None, (0.8, 0.1, 0.1)))
    after = by_id(ids, assign_splits(ids, labels, None, (0.8, 0.1, 0.1)))
    assert sum(after[name] != split for name, split in before.items()) <= 2


def test_the_hash_salt_of_python_changes_nothing():
    code = (
        "import numpy as np\nfrom bef_jax.data.assignment import assign_splits\n"
        "ids = [f'{i}' for i in range(200)]\n"
        "for groups in (None, [name[:-1] for name in ids]):\n"
        "    print(assign_splits(ids, np.arange(200) % 2, groups, (0.6, 0.2, 0.2)))"
    )
    found = {
        subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": salt})
        for salt in ("1", "2", "3")
    }
    assert len(found) == 1


def test_few_groups_are_spread_or_refused():
    """The two large groups have class 0; train must also get one of class 1."""
    groups = ["a"] * 1000 + ["b"] * 900 + ["c"] * 500 + ["d"] * 400
    labels = np.repeat([0, 1], [1900, 900])
    splits = assign_splits(names(2800), labels, groups, (0.8, 0.1, 0.1))
    assert {name: {groups[row] for row in rows} for name, rows in splits.items()} == {
        "train": {"a", "c"}, "valid": {"b"}, "test": {"d"},
    }  # fmt: skip
    few = names(2400), labels[:2400], groups[:2400]
    expect_error(
        "config.data.group gives 3 groups, but train needs 2 to have every class, and valid and "
        "test one each",
        assign_splits,
        *few,
        (0.8, 0.1, 0.1),
    )
    assert len(assign_splits(*few, (0.8, 0.2, 0))["valid"]) == 900


@pytest.mark.parametrize(
    "ratio", [(1, 0, 0), (0, 1, 1), (0.9, -0.1, 0.2), (1, 1), (1, 1, float("nan")), (1, 1, 1e999)]
)
@pytest.mark.parametrize("groups", [None, ["a", "b", "c"]])
def test_a_wrong_ratio_is_refused(ratio, groups):
    with pytest.raises(UserError, match=r"config.data.split_ratio is"):
        assign_splits(names(3), np.zeros(3, int), groups, ratio)


def test_a_split_that_stays_empty_is_refused():
    expect_error(
        "config.data.split_ratio leaves none of 2 patches for the valid split",
        assign_splits,
        names(2),
        np.array([0, 1]),
        None,
        (0.8, 0.1, 0.1),
    )


@pytest.mark.slow
def test_a_million_patches_of_100000_groups_take_seconds():
    rng = np.random.default_rng(0)
    groups = [f"P{group}" for group in rng.integers(0, 100_000, 1_000_000)]
    start = time.monotonic()
    splits = assign_splits(names(1_000_000), rng.integers(0, 9, 1_000_000), groups, (8, 1, 1))
    assert time.monotonic() - start < 60  # it takes 3 s on an idle machine
    assert abs(len(splits["train"]) - 800_000) < 10


def test_given_splits_that_share_groups_are_reported(caplog):
    split_groups = {"test": ["a", "b", "b"], "valid": ["c"], "train": ["b", "z\n", "a", "d"]}
    with caplog.at_level(logging.WARNING):
        report_shared(split_groups)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "groups that are in more than one split: 2, with 5 patches; the first is a."
    )
    caplog.clear()
    report_shared({"test": ["a"], "valid": ["b", "b"], "train": ["c"]})
    assert not caplog.records
