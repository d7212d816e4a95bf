"""What the sources share that list their pictures."""

import logging

import numpy as np
import pytest

from bef_jax.data.sources import listing
from bef_jax.errors import UserError
from tests.data.conftest import expect_error


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ({"10", "9", "-1"}, (), ("-1", "9", "10")),
        ({"1", "01"}, (), ("01", "1")),
        ({"10", "9", "x"}, (), ("10", "9", "x")),
        ({"1" * 5000, "2"}, (), ("1" * 5000, "2")),
        ({"b c", "🦠", "B"}, (), ("B", "b c", "🦠")),
        ({"b", "a"}, ("b", "a"), ("b", "a")),
    ],
)
def test_classes_are_in_the_order_of_their_labels(found, wanted, expected):
    assert listing.order_classes(found, wanted, "table") == expected


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        ({"a"}, (), "table: has one class, 'a'; a network needs two or more"),
        (set(), (), "table: has no class; a network needs two or more"),
        (set(map(str, range(10_001))), (), "table: has 10001 classes, and at most 10000 are read"),
        ({"a", "b"}, ("a", "c"), "config.data.classes has 'c', but table does not; it has a, b"),
        ({"a", "b", "c"}, ("a", "c"), "table: has classes that config.data.classes lacks: b"),
        ({"a", "b"}, ("a", "b", "a"), "config.data.classes names a class twice: a, b, a"),
        ({"a\n", "b"}, ("a", "c"), r"it has a\n, b"),
    ],
)
def test_wrong_classes_are_named(found, wanted, message):
    expect_error(message, listing.order_classes, found, wanted, "table")


def test_given_splits_need_patches_and_train_needs_every_class():
    rows = {"train": [0, 1, 1], "valid": [0], "test": [1]}

    def check(**others):
        labels = {split: np.array(found, np.uint8) for split, found in (rows | others).items()}
        listing.check_splits(labels, ("a", "b", "c"), "table")

    check()
    check(test=[])
    expect_error("table: has no patch of the valid split", lambda: check(valid=[]))
    expect_error("table: has no patch of the train split", lambda: check(train=[]))
    expect_error("train has no patch of class 'c', which test has", lambda: check(test=[2, 0]))


@pytest.mark.parametrize(
    ("pattern", "group"),
    [
        (r"(?P<group>P\d+)_", "P12"),
        (r"(\d)(?P<group>P\d+)_", "P12"),
        (r"P(\d+)_(.)", "12"),
        (r"P\d+", "P12"),
        ("^[^/]+", "tumour"),
    ],
)
def test_a_pattern_finds_the_group_in_a_path(pattern, group):
    assert listing.group_finder(pattern)("tumour/7P12_x.png") == group


@pytest.mark.parametrize("pattern", ["Q", "q*", "(Q)?t"])
def test_a_path_without_a_group_is_named(pattern):
    find = listing.group_finder(pattern)
    expect_error(
        "config.data.group finds no group in 'tumour/P12\\n.png'", find, "tumour/P12\n.png"
    )


@pytest.mark.parametrize(
    "pattern", ["(", "[z-a]", "(?P<group>a)(?P<group>b)", "(" * 10_000, "a{9999999999999}"]
)
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(UserError, match=r"config.data.group is not a regular expression"):
        listing.group_finder(pattern)


def test_rows_are_divided_as_given_or_by_the_ratio(make_data, caplog):
    data = make_data("npz", "x", split_ratio=(0.5, 0.5, 0))
    ids, labels, groups = list("abcd"), np.array([0, 1, 0, 1]), ["P", "Q", "P", "R"]

    def divide(given, groups):
        return listing.divide(data, ids, labels, groups, given, ("x", "y"), "table")

    ours = divide(None, groups)
    assert ours in [
        {"test": [], "valid": [3], "train": [0, 1, 2]},
        {"test": [], "valid": [1], "train": [0, 2, 3]},
    ]
    given = {"train": [3, 2], "valid": [1, 0]}
    with caplog.at_level(logging.WARNING):
        assert divide(given, None) is given
        assert not caplog.records
        assert divide(given, groups) is given
    assert "more than one split: 1, with 2 patches; the first is P" in caplog.text
