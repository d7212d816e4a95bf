"""What the sources share that list their pictures."""

import logging

import numpy as np
import pytest

from bef_jax.data.sources import listing
from bef_jax.data.sources.decode import Listed
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
        ({"a"}, (), "table: all patches are of class 'a'; add patches of another"),
        (set(), (), "table: holds no patch"),
        (set(map(str, range(10_001))), (), "table: has 10001 classes, but 10000 are the most"),
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
    check(valid=[])  # `divide` then takes some of train
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
    message = (
        f"config.data.group={pattern} finds no group in 'tumour/P12\\n.png'; change the pattern"
    )
    expect_error(message, find, "tumour/P12\n.png")


@pytest.mark.parametrize(
    "pattern", ["(", "[z-a]", "(?P<group>a)(?P<group>b)", "(" * 10_000, "a{9999999999999}"]
)
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(UserError, match=r"config.data.group is not a regular expression"):
        listing.group_finder(pattern)


def listed(ids, labels, groups):
    groups = groups or [None] * len(ids)
    rows = zip(ids, labels, groups, strict=True)
    return [Listed(f"x/{name}", label, name, group) for name, label, group in rows]


def test_pictures_are_divided_as_given_or_by_the_ratio(make_data, caplog):
    data = make_data("npz", "x", split_ratio=(0.5, 0.5, 0))

    def divide(given, groups):
        pictures = listed("abcd", [0, 1, 0, 1], groups)
        splits = listing.divide(data, pictures, given, ("x", "y"), "table")
        return {split: "".join(picture.id for picture in found) for split, found in splits.items()}

    by_ratio = divide(None, ["P", "Q", "P", "R"])
    assert by_ratio in ({"valid": "d", "train": "abc"}, {"valid": "b", "train": "acd"})
    given = {"train": [3, 2], "valid": [1, 0], "test": []}
    with caplog.at_level(logging.WARNING):
        assert divide(given, None) == {"train": "dc", "valid": "ba"}
        assert not caplog.records
        assert divide(given, ["P", "Q", "P", "R"]) == {"train": "dc", "valid": "ba"}
    assert "more than one split: 1, with 2 patches; the first is P" in caplog.text
    expect_error(
        "table: train has no patch of class 'y'", divide, {"train": [0], "valid": [1]}, None
    )


@pytest.mark.parametrize("grouped", [True, False])
def test_without_a_valid_split_a_part_of_train_is_valid(grouped, make_data, caplog):
    pictures = [
        Listed(f"{row}.png", row % 2, f"{row}.png", f"P{row // 6}" if grouped else None)
        for row in range(80)
    ]
    given = {"train": range(10, 70), "test": range(10)}
    data = make_data("csv", "t.csv", split_ratio=(3, 1, 7))
    with caplog.at_level(logging.INFO):
        found = listing.divide(data, pictures, given, ("a", "b"), "t.csv")
    assert found["test"] == pictures[:10]
    # Both are in the order of the table, and every patch of train is in one of them.
    names = {split: [int(each.id[:-4]) for each in found[split]] for split in ("train", "valid")}
    assert names["train"] == sorted(names["train"]) and names["valid"] == sorted(names["valid"])
    assert sorted(names["train"] + names["valid"]) == list(range(10, 70))
    assert abs(len(names["valid"]) - 15) <= (6 if grouped else 1), "a quarter of train"
    if grouped:
        groups = [{each.group for each in found[split]} for split in ("train", "valid")]
        assert not groups[0] & groups[1]
    assert "of the 60 patches of train are used as valid" in caplog.text


def test_a_long_id_or_group_is_refused_since_all_take_as_much_memory(make_data):
    def divide(ids, groups):
        pictures = listed(ids, [0, 1, 1], groups)
        listing.divide(make_data("npz", "x"), pictures, None, ("x", "y"), "table")

    message = "is a name of more than 1024 characters; shorten it"
    expect_error(f"table: {'x' * 100} {message}", divide, ["x" * 1025, "", ""], None)
    expect_error(message.replace("name", "group"), divide, list("abc"), ["", "x" * 1025, ""])
