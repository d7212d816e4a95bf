"""Tables of pictures in the forms that spreadsheets write, and with each mistake."""

import codecs
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bef_jax.data import sources, store
from bef_jax.data.sources import csv
from bef_jax.errors import UserError
from tests.data.sources.conftest import expect_error, read_all
from tests.memory import growth_of

SPLIT_OF = ["train"] * 6 + ["valid"] * 3 + ["test"] * 3


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with img/0.png to img/11.png; the first pixel of each is its number."""
    rng = np.random.default_rng(0)
    (tmp_path / "img").mkdir()
    for number in range(12):
        pixels = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        pixels[0, 0] = number
        Image.fromarray(pixels).save(tmp_path / "img" / f"{number}.png")
    return tmp_path


@pytest.fixture
def table(folder):
    """Returns table(text), which writes patches.csv."""

    def write(text, encoding="utf-8"):
        path = folder / "patches.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return path

    return write


def rows_of(header, row, count=12):
    """Returns a table; `row` is formatted with n and the split and label of the picture n."""
    lines = [
        row.format(n=n, split=SPLIT_OF[n], label="ab"[n % 2], group=f"P{n // 2}")
        for n in range(count)
    ]
    return "\n".join([header, *lines]) + "\n"


PLAIN = rows_of("path,label,split", "img/{n}.png,{label},{split}")


EXPECTED = {
    split: [(n, n % 2, f"img/{n}.png", None) for n in range(12) if SPLIT_OF[n] == split]
    for split in ("test", "valid", "train")
}


FORMS = {
    "plain": PLAIN,
    "no last newline": PLAIN.rstrip("\n"),
    "empty lines": PLAIN.replace("\n", "\n\n") + "\n\n",
    "BOM": codecs.BOM_UTF8 + PLAIN.encode(),
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "spaces": PLAIN.replace(",", " , "),
    "names of columns": PLAIN.replace("path,label,split", " PATH, Label ,SPLIT"),
    "quotes": rows_of('"path","label","split"', '"img/{n}.png","{label}","{split}"'),
    "order": rows_of("split,label,path", "{split},{label},img/{n}.png"),
    "other columns": rows_of("x,path,,label,y,split", '"1,5",img/{n}.png,,{label},"a\nb",{split}'),
    "semicolons, decimal commas": rows_of("x;path;label;split", "1,5;img/{n}.png;{label};{split}"),
    "names of splits": PLAIN.replace(",valid", ",Validation").replace(",train", ",TRAIN"),
    "val": PLAIN.replace(",valid", ",val"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_gives_the_same_patches(form, table, make_data):
    classes, found = read_all(make_data("csv", table(FORMS[form])))
    assert classes == ("a", "b")
    assert found == EXPECTED
    assert list(found) == ["test", "valid", "train"]


def test_patches_come_in_the_order_of_the_table_and_the_first_are_kept(table, make_data):
    head, *rows = PLAIN.splitlines()
    data = make_data("csv", table("\n".join([head, *reversed(rows)])), train_size=4, test_size=2)
    _, found = read_all(data)
    numbers = {split: [row[0] for row in rows] for split, rows in found.items()}
    assert numbers == {"test": [11, 10], "valid": [8, 7, 6], "train": [5, 4, 3, 2]}


def test_absolute_paths_and_a_folder_with_one_table(folder, table, make_data):
    path = table(PLAIN.replace("img/", f"{folder}/img/"))
    _, found = read_all(make_data("csv", folder))
    assert found == {
        split: [(n, label, f"{folder}/{name}", None) for n, label, name, _ in rows]
        for split, rows in EXPECTED.items()
    }
    assert csv.home(make_data("csv", folder)) == csv.home(make_data("csv", path)) == folder
    path.with_name("more.CSV").write_text("")
    expect_error(make_data("csv", folder), f"{folder}: holds 2 .csv files (more.CSV, patches.csv)")
    expect_error(make_data("csv", folder / "img"), f"{folder / 'img'}: holds 0 .csv files; set")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9"], ("9", "10")),
        (["tumour, grade 2", "🦠 normal"], ("tumour, grade 2", "🦠 normal")),
        (["b", "a"], ("a", "b")),
    ],
)
def test_labels_may_be_numbers_phrases_or_emoji(labels, classes, table, make_data):
    rows = [f'img/{n}.png,"{labels[n % 2]}",{SPLIT_OF[n]}' for n in range(12)]
    text = "\n".join(["path,label,split", *rows])
    found_classes, found = read_all(make_data("csv", table(text)))
    assert found_classes == classes
    assert [classes[row[1]] for row in found["train"]] == labels * 3
    _, found = read_all(make_data("csv", table(text), classes=tuple(reversed(classes))))
    assert [classes[1 - row[1]] for row in found["train"]] == labels * 3


@pytest.mark.parametrize("fields", [{}, {"group": r"img/(\d)"}, {"group": "Patient "}])
def test_splits_of_our_own_share_no_group_in_any_order_of_rows(fields, table, make_data):
    column = "patient" if "P" in fields.get("group", "") else "group"
    text = rows_of(f"path,{column},label", "img/{n}.png,{group},{label}")
    data = make_data("csv", table(text), split_ratio=(0.5, 0.25, 0.25), **fields)
    found = read_all(data)[1]
    group_of = {
        n: str(n)[0] if "img" in fields.get("group", "") else f"P{n // 2}" for n in range(12)
    }
    sides = {split: {row[3] for row in rows} for split, rows in found.items()}
    assert {row[0]: row[3] for rows in found.values() for row in rows} == group_of
    assert sum(map(len, sides.values())) == len(set(group_of.values()))
    head, *rows = text.splitlines()
    table("\n".join([head, *np.random.default_rng(0).permutation(rows)]))
    assert {split: set(rows) for split, rows in read_all(data)[1].items()} == {
        split: set(rows) for split, rows in found.items()
    }


def test_given_splits_that_share_a_group_are_reported(table, make_data, caplog):
    text = rows_of("path,label,split,group", "img/{n}.png,{label},{split},{group}")
    with caplog.at_level(logging.WARNING):
        read_all(make_data("csv", table(text)))
        assert "the first is P4" in caplog.text  # P4 has the patches 8 and 9
        caplog.clear()
        read_all(make_data("csv", table(text.replace("img/8.png,a,valid", "img/8.png,a,test"))))
        assert "the first is P" not in caplog.text


def with_line(number, line):
    lines = PLAIN.splitlines()
    lines[number - 1] = line
    return "\n".join(lines)


MISTAKES = {
    "no path": (PLAIN.replace("path", "file"), ": has no column path; line 1 must name path and"),
    "no label": (PLAIN.replace("label", "y"), "has no column label; line 1 must name path and lab"),
    "two columns": (PLAIN.replace("split", "Label"), ": has the column label twice; rename one"),
    "empty": ("", ": has no column path; line 1 must name path and label, but names "),
    "no rows": ("path,label\n", ": holds no patch; set config.data.dir"),
    "few": (with_line(4, "img/2.png,a"), " line 4: has 2 fields, but line 1 names 3 columns"),
    "many": (with_line(4, "img/2.png,a,train,"), " line 4: has 4 fields, but line 1 names 3"),
    "empty path": (with_line(4, " ,a,train"), " line 4: its path is empty"),
    "empty label": (with_line(4, "img/2.png,,train"), " line 4: its label is empty"),
    "NUL": (with_line(4, "img/2.png\0,a,train"), " line 4: its path is not text"),
    "empty split": (with_line(4, "img/2.png,a,"), " line 4: its split is empty"),
    "split": (with_line(4, "img/2.png,a,dev"), " line 4: split 'dev'; it must be one of train, va"),
    "twice": (with_line(4, "img/0.png,b,train"), " line 4: img/0.png has an earlier row; each"),
    "twice, in two ways": (with_line(4, "./img//0.png,b,test"), " line 4: ./img//0.png has an ear"),
    "missing": (
        with_line(4, "img/x.png,a,train") + "\nimg/y.png,a,train",
        " line 4: img/x.png is missing, the first of 2 of 13 files; give paths relative to ",
    ),
    "folder": (with_line(4, "img,a,train"), "/img: is a folder; name a regular file"),
    "below a file": (with_line(4, "img/1.png/x,a,train"), " line 4: img/1.png/x is missing"),
    "long name": (with_line(4, "x" * 300 + ",a,train"), " line 4: "),
    "not UTF-8": (PLAIN.replace("a,train", "ä,train").encode("latin-1"), ": is not UTF-8 ("),
    "UTF-16": (PLAIN.encode("utf-16"), ": is not UTF-8 ("),
    "long line": (with_line(4, "x" * 70_000), ": has a line of more than 65536 characters"),
    "open quote": (with_line(4, '"img/2.png,a,train'), " line 4: cannot be read (unexpected end"),
    "one class": (PLAIN.replace(",b,", ",a,"), ": all patches are of class 'a'; add patches of"),
    "a class only in test": (
        with_line(13, "img/11.png,c,test"), ": train has no patch of class 'c', which test has",
    ),
    "no picture": (with_line(2, "patches.csv,a,train"), "patches.csv: cannot be read as a picture"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_line(mistake, table, make_data):
    text, message = MISTAKES[mistake]
    path = table(text)
    expect_error(make_data("csv", path), str(path.parent), message)


def test_a_group_that_is_empty_or_not_found_is_named(table, make_data):
    text = rows_of("path,label,group", "img/{n}.png,{label},{group}")
    expect_error(make_data("csv", table(text.replace("P3", ""))), " line 8: its group is empty")
    expect_error(
        make_data("csv", table(text), group="patient"),
        "config.data.group=patient finds no group in 'img/0.png'; change the pattern, or name a "
        "column of patches.csv",
    )
    expect_error(make_data("csv", table(text), group="("), "is not a regular expression")


def test_many_classes_are_refused(table, make_data):
    text = "path,label\n" + "".join(f"{n}.png,{n}\n" for n in range(10_001))
    expect_error(make_data("csv", table(text)), "has 10001 classes, but 10000 are the most")


def test_a_table_that_is_missing_is_named(tmp_path, make_data):
    expect_error(make_data("csv", tmp_path / "x.csv"), f"{tmp_path}/x.csv: no such file; set")


def test_a_special_file_is_refused(folder, special, printed_by):
    code, expected = [], []
    for number, kind in enumerate(["a FIFO", "a socket", "a device"]):
        picture = f"img/{number}.png"
        itself, other = folder / f"{kind}.csv", folder / f"{number}.csv"
        special(kind, itself)
        special(kind, folder / picture)
        other.write_text(f"path,label\nimg/11.png,a\n{picture},b\n")
        code += [f"sources.open_source(data_of('csv', {str(path)!r}))" for path in (itself, other)]
        expected += [
            f"{itself}: is {kind}; name a regular file",
            f"{other} line 3: {folder / picture}: is {kind}; name a regular file",
        ]
    assert printed_by(*code) == expected


def test_a_link_is_followed_and_a_broken_one_is_missing(folder, table, make_data):
    path = table(PLAIN)
    os.rename(folder / "img/3.png", folder / "there.png")
    (folder / "img/3.png").symlink_to(folder / "there.png")
    assert read_all(make_data("csv", path))[1] == EXPECTED
    (folder / "there.png").unlink()
    expect_error(
        make_data("csv", path), " line 5: img/3.png is missing, the first of 1 of 12 files"
    )


def test_the_split_changes_what_is_read_and_is_in_the_identity(tmp_path, make_data):
    first = csv.identity(make_data("csv", tmp_path / "x.csv"))
    assert first["dir"] == str(tmp_path / "x.csv")
    for field, value in {
        "split_ratio": (0.5, 0.3, 0.2), "group": "x", "patch_size": 64, "resize": "side",
        "mpp": 0.5, "classes": ("a", "b"), "train_size": 4,
    }.items():  # fmt: skip
        other = csv.identity(make_data("csv", tmp_path / "x.csv", **{field: value}))
        assert {name for name in first if first[name] != other[name]} == {field}


def test_a_table_in_the_order_of_npz_makes_the_same_store(tmp_path, patches, write, make_data):
    """So it gives the same training; only the names of the patches differ."""
    write("npz", tmp_path, patches)
    rows = ["path,label,split"]
    for split, (images, labels) in patches.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(tmp_path / f"{split}{number}.png")
            rows.append(f"{split}{number}.png,{label},{split}")
    (tmp_path / "patches.csv").write_text("\n".join(rows))
    ours = make_data("csv", tmp_path / "patches.csv")
    theirs = make_data("npz", tmp_path)
    assert store.store_path(ours) == tmp_path / "store_csv_patches"
    assert store.prepare(ours)["content"] == store.prepare(theirs)["content"]
    for split in patches:
        one, other = (store.open_split(store.store_path(data), split) for data in (ours, theirs))
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert one.ids[0] == f"{split}0.png"


@pytest.mark.slow
def test_a_long_table_takes_little_memory(folder, table, make_data, monkeypatch):
    read_all(make_data("csv", table(PLAIN)))  # imports the libraries
    count = 200_000
    path = table(rows_of("path,label", "pictures/of/a/folder/{n}.png,{label}", 0))
    with open(path, "a") as file:
        file.writelines(f"img/1.png/../{n}/picture.png,{n % 2}\n" for n in range(count))
    monkeypatch.setattr(os.path, "isfile", lambda path: True)

    def read_table():
        # Decoding starts with the first picture, which is not there.
        with pytest.raises(UserError, match=r"picture\.png"):
            sources.open_source(make_data("csv", path))

    assert growth_of(read_table) < count * 1000


def test_two_tables_of_a_folder_have_a_store_each(table, make_data):
    first = make_data("csv", table(PLAIN))
    assert store.prepare(first)["class_counts"]
    other = table(PLAIN.replace(",b,", ",c,")).rename(Path(first.dir).with_name("other.csv"))
    assert store.prepare(make_data("csv", other))["classes"] == ["a", "c"]
    again = make_data("csv", other, store=str(store.store_path(first)))
    Path(first.dir).write_text(PLAIN)  # both tables are there
    with pytest.raises(UserError, match=r"other\.csv: has changed since the store"):
        store.prepare(again)


def test_a_table_that_was_edited_is_not_the_one_of_the_store(table, make_data):
    data = make_data("csv", table(PLAIN))
    store.prepare(data)
    store.prepare(data)
    Path(data.dir).write_text(PLAIN.replace(",a,", ",c,"))
    with pytest.raises(UserError, match=r"patches\.csv: has changed since the store"):
        store.prepare(data)
    Path(data.dir).unlink()
    assert store.prepare(data)["classes"] == ["a", "b"]


def test_a_limit_keeps_the_shares_of_the_classes_of_a_sorted_table(table, make_data):
    rows = PLAIN.splitlines()
    by_label = "\n".join([rows[0], *sorted(rows[1:], key=lambda row: row.split(",")[1])])
    _, everything = read_all(make_data("csv", table(by_label)))
    _, some = read_all(make_data("csv", table(by_label), train_size=4))
    assert [label for _, label, _, _ in some["train"]] == [0, 0, 1, 1]
    # They stay in the order of the table.
    assert some["train"] == [row for row in everything["train"] if row in some["train"]]
