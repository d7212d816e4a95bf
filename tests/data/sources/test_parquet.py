"""Parquet files as Hugging Face's data sets have them: splits, classes, names and groups."""

import pytest

from tests.data.sources.conftest import read_all
from tests.data.sources.parquet_files import (
    NUMBERS,
    numbers_of,
    pa,
    picture,
    pq,
    table_of,
    write_splits,
)


@pytest.mark.parametrize("label_type", [pa.bool_(), pa.int64(), pa.uint8()])
def test_the_layout_of_1aurent_patchcamelyon(label_type, tmp_path, make_data):
    """Its labels are bool, without names, and its paths are empty."""
    data = make_data("parquet", write_splits(tmp_path, label_type=label_type))
    classes, found = read_all(data)
    assert classes == ("0", "1")
    assert list(found) == ["test", "valid", "train"] and numbers_of(found) == NUMBERS
    assert all(label == number % 2 for rows in found.values() for number, label, *_ in rows)
    assert [row[2] for row in found["valid"]] == [
        f"valid-{shard:05d}-of-00002-0123456789abcdef_{row}" for shard in (0, 1) for row in (0, 1)
    ]
    with data.unlocked():
        data.classes = ("normal", "metastasis")
    classes, named = read_all(data)
    assert classes == ("normal", "metastasis") and named == found


@pytest.mark.parametrize(
    "pattern",
    [
        "{split}-{shard:05d}-of-00002.parquet",
        "{split}{shard}.parquet",
        "default/{split}/000{shard}.parquet",
        "data/{split}/{split}-{shard}.parquet",
    ],
)
def test_splits_are_found_by_the_names_of_files_or_folders(pattern, tmp_path, make_data):
    data = make_data("parquet", write_splits(tmp_path, pattern))
    for hidden in (tmp_path / ".notes.parquet", tmp_path / ".cache" / "notes.parquet"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_text("no Parquet file")
    assert numbers_of(read_all(data)[1]) == NUMBERS
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        if "valid" in path.name:
            path.rename(path.with_name(path.name.replace("valid", "Validation")))
    assert numbers_of(read_all(data)[1]) == NUMBERS
    assert numbers_of(read_all(make_data("parquet", tmp_path, valid_size=3, train_size=5))[1]) == {
        "test": NUMBERS["test"], "valid": [8, 9, 10], "train": [0, 1, 2, 3, 4],
    }  # fmt: skip


def test_names_of_classes_keep_their_own_order(tmp_path, make_data):
    folder = write_splits(tmp_path, names=["tumour", "normal", "absent"])
    classes, found = read_all(make_data("parquet", folder))
    assert classes == ("tumour", "normal")
    assert [row[1] for row in found["train"]] == [0, 1] * 4
    classes, found = read_all(make_data("parquet", folder, classes=("normal", "tumour")))
    assert classes == ("normal", "tumour")
    assert [row[1] for row in found["train"]] == [1, 0] * 4


def test_labels_may_be_text_and_images_bytes_alone(tmp_path, make_data):
    labels = ["tumour 🦠", "normal"] * 8
    table = pa.table({"image": [picture(number) for number in range(16)], "label": labels})
    table = table.set_column(1, "label", table["label"].dictionary_encode())
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=5)
    classes, found = read_all(make_data("parquet", tmp_path / "all.parquet", split_ratio=(2, 1, 1)))
    assert classes == ("normal", "tumour 🦠")
    rows = [row for rows in found.values() for row in rows]
    assert sorted(row[0] for row in rows) == list(range(16))
    assert all(label == 1 - number % 2 for number, label, *_ in rows)
    assert all(name == f"all_{number}" for number, _, name, _ in rows)
    assert {split: len(rows) for split, rows in found.items()} == {
        "test": 4,
        "valid": 4,
        "train": 8,
    }


@pytest.mark.parametrize("fields", [{}, {"group": "patient"}])
@pytest.mark.parametrize("kind", [pa.int32(), pa.string(), pa.large_string()])
def test_files_without_splits_are_divided_by_groups(kind, fields, tmp_path, make_data):
    column = fields.get("group", "group")
    for shard in range(4):
        numbers = range(4 * shard, 4 * shard + 4)
        # A patient's patches lie in two files.
        groups = pa.array([str(number % 8) for number in numbers]).cast(kind)
        paths = [f"{number}.png" for number in numbers]
        table = table_of(numbers, paths=paths, **{column: groups})
        pq.write_table(table, tmp_path / f"train-0000{shard}-of-00004.parquet")
    found = read_all(make_data("parquet", tmp_path, split_ratio=(0.5, 0.25, 0.25), **fields))[1]
    assert sorted(row[0] for rows in found.values() for row in rows) == list(range(16))
    sides = {split: {row[3] for row in rows} for split, rows in found.items()}
    assert sum(map(len, sides.values())) == 8
    for rows in found.values():
        assert all(group == str(number % 8) for number, _, _, group in rows)
        assert all(name == f"{number}.png" for number, _, name, _ in rows)
        assert rows == sorted(rows)


def test_paths_that_repeat_are_no_ids(tmp_path, make_data):
    for split, names in (("train", "aba"), ("valid", "abc"), ("test", ["", "a", "b"])):
        pq.write_table(table_of(range(3), paths=list(names)), tmp_path / f"{split}.parquet")
    ids = {
        split: [row[2] for row in rows]
        for split, rows in read_all(make_data("parquet", tmp_path))[1].items()
    }
    assert ids == {
        "train": ["train_0", "train_1", "train_2"], "valid": ["a", "b", "c"],
        "test": ["test_0", "test_1", "test_2"],
    }  # fmt: skip
