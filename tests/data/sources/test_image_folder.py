"""Folders of pictures, compared with the files that were written, by their paths."""

import io
import logging
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bef_jax.data import sources, store
from bef_jax.data.sources import listing
from tests.data.sources.conftest import expect_error
from tests.special_files import make_special

SIDE = 32
FLAT = [f"{name}/{patient}_{i}.png" for name in "ab" for patient in "pqrs" for i in range(5)]
GIVEN = [f"{split}/{name}/{i}.png" for split in ("train", "valid") for name in "ab" for i in "12"]


def pixels_of(name):
    """Returns the pixels of the picture with this path: noise that no other one has."""
    rng = np.random.default_rng(list(name.encode(errors="surrogateescape")))
    return rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def lay(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(name)).save(folder / name)
    return folder


@pytest.fixture
def make(make_data):
    """Returns make(folder, **fields): config.data of that folder."""
    return lambda folder, **fields: make_data(
        "image_folder", folder, **{"patch_size": SIDE, **fields}
    )


def read(data):
    """Returns the classes, and for each split the (id, class, group) of its patches, in order."""
    contents = sources.open_source(data)
    found = {}
    for split, chunk in contents.chunks:
        for image, name in zip(chunk.images, chunk.ids.tolist(), strict=True):
            np.testing.assert_array_equal(image, pixels_of(name))
        groups = [None] * len(chunk.ids) if chunk.groups is None else chunk.groups.tolist()
        names = [contents.classes[label] for label in chunk.labels]
        rows = list(zip(chunk.ids.tolist(), names, groups, strict=True))
        found.setdefault(split, []).extend(rows)
    return contents.classes, found


def test_a_folder_per_class_is_divided_into_splits(make, tmp_path):
    classes, found = read(make(lay(tmp_path, FLAT), split_ratio=(0.6, 0.2, 0.2)))
    assert classes == ("a", "b")
    assert {split: len(rows) for split, rows in found.items()} == {
        "test": 8,
        "valid": 8,
        "train": 24,
    }
    rows = [row for rows in found.values() for row in rows]
    assert sorted(rows) == [(name, name[0], None) for name in FLAT]


@pytest.mark.parametrize("valid", ["valid", "val", "Validation"])
def test_folders_of_splits_are_kept(valid, make, tmp_path):
    names = [name.replace("valid", valid) for name in GIVEN] + ["test/b/1.png"]
    _, found = read(make(lay(tmp_path, names)))
    assert list(found) == ["test", "valid", "train"]
    for split, rows in found.items():
        folder = valid if split == "valid" else split
        expected = [(name, name.split("/")[1], None) for name in names if name.startswith(folder)]
        assert sorted(rows) == sorted(expected)


def test_the_order_does_not_depend_on_the_file_system(make, tmp_path):
    names = FLAT + ["a/x/y/1.png", "a/x 1.png", "b/ä.png", "b/Z.png"]
    shuffled = random.Random(0).sample(names, len(names))
    data = [make(lay(tmp_path / str(i), each)) for i, each in enumerate((names, shuffled))]
    assert read(data[0]) == read(data[1])


def test_hidden_and_other_files_are_left_out_and_all_formats_are_read(make, tmp_path):
    lay(tmp_path, FLAT)
    for name in ["a/.p_0.png", "a/.hidden/1.png", ".git/1.png", "notes.txt", "a/thumbs.db"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    lossless = lay(tmp_path, ["a/1.TIF", "a/2.tiff", "b/3.bmp"])
    Image.fromarray(pixels_of("b/4.webp")).save(lossless / "b/4.webp", lossless=True)
    _, found = read(make(tmp_path))
    names = {name for rows in found.values() for name, _, _ in rows}
    assert names == {*FLAT, "a/1.TIF", "a/2.tiff", "b/3.bmp", "b/4.webp"}


def test_names_may_be_of_any_language_and_differ_in_case_or_form_only(make, tmp_path):
    folders = ["b c", "🦠", "B C", "é", unicodedata.normalize("NFD", "é"), "=cmd|'!A0"]
    names = [f"{folder}/{i}\n.png" for folder in folders for i in range(3)]
    classes, found = read(make(lay(tmp_path, names)))
    assert sorted(classes) == sorted(folders)
    assert {(name, group) for name, group, _ in found["train"]} <= {
        (name, name.split("/")[0]) for name in names
    }


def test_the_config_orders_the_classes(make, tmp_path):
    data = make(lay(tmp_path, FLAT), classes=("b", "a"))
    assert sources.open_source(data).classes == ("b", "a")
    assert read(data)[1] == read(make(tmp_path))[1]


def test_one_picture_per_class_and_split_is_enough(make, tmp_path):
    names = [f"{split}/{name}/1.png" for split in ("train", "valid", "test") for name in "ab"]
    _, found = read(make(lay(tmp_path, names)))
    assert sorted(row[0] for rows in found.values() for row in rows) == sorted(names)


def test_the_first_patches_of_a_split_have_all_classes_in_proportion(make, tmp_path):
    names = [f"train/{name}/{i}.png" for name, n in (("a", 30), ("b", 10)) for i in range(n)]
    data = make(lay(tmp_path, names + GIVEN), train_size=8)
    _, found = read(data)
    assert [row[1] for row in found["train"]].count("a") == 6
    assert len(found["train"]) == 8


# --- groups


def test_a_pattern_gives_groups_which_no_two_splits_share(make, tmp_path):
    data = make(lay(tmp_path, FLAT), group=r"/(\w)_", split_ratio=(0.5, 0.25, 0.25))
    _, found = read(data)
    groups = {split: {group for _, _, group in rows} for split, rows in found.items()}
    assert sorted("".join(map("".join, groups.values()))) == list("pqrs")
    assert all(name.split("/")[1][0] == group for name, _, group in found["train"])


def test_groups_that_given_splits_share_are_reported_once(make, tmp_path, caplog):
    lay(tmp_path, [*GIVEN, "valid/a/3.png", "test/a/4.png", "test/b/4.png"])
    read(make(tmp_path, group=r"\d"))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "more than one split: 2, with 8 patches; the first is 1." in record.getMessage()


# --- mistakes: found when the source is opened, before a picture is decoded


def add(*names):
    return lambda folder: lay(folder, names)


def move(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def empty(name):
    return lambda folder: (folder / name).mkdir(parents=True)


FLAT_MISTAKES = {
    "loose": (add("c.png"), {}, "{}/c.png: is in no folder of a class; move each picture"),
    "empty": (empty("c/d"), {}, "{}/c: holds no picture (.png, "),
    "one class": (move("b", "a/b"), {}, "{}: all patches are of class 'a'"),
    "not listed": (add(), {"classes": ("a", "c")}, "config.data.classes has 'c', but {} does not"),
    "pattern": (add(), {"group": "("}, "config.data.group is not a regular expression"),
    "no group": (add("b/t.png"), {"group": r"[pqrs]_"}, "finds no group in 'b/t.png'"),
    "no match": (add(), {"group": "patient"}, "finds no group in 'a/p_0.png'"),
    "side": (add(), {"patch_size": 48}, "32x32 pixels, but config.data.patch_size is 48; set it"),
    "ratio": (add(), {"split_ratio": (1, 0, 0)}, "config.data.split_ratio is (1, 0, 0)"),
    "test among classes": (move("b", "test"), {}, "{}/a: is beside test, which are splits"),
}  # fmt: skip
GIVEN_MISTAKES = {
    "loose": (add("train/c.png"), {}, "{}/train/c.png: is in no folder of a class"),
    "looser": (add("c.png"), {}, "{}/c.png: is in no folder of a class"),
    "beside": (add("c/c.png"), {}, "{}/c: is beside train, valid, which are splits"),
    "no train": (move("train", "test"), {}, "{}: has test, valid, but no folder train; add it"),
    "two": (add("val/a/1.png"), {}, "{}/valid: val is the valid split, too"),
    "unknown": (add("test/c/1.png"), {}, "train has no patch of class 'c', which test has"),
    "empty": (empty("test/a"), {}, "{}/test/a: holds no picture"),
    "empty split": (empty("test"), {}, "{}/test: has no folders; put the pictures of each class"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "mistake"),
    [(FLAT, each) for each in FLAT_MISTAKES.values()]
    + [(GIVEN, each) for each in GIVEN_MISTAKES.values()],
    ids=[f"flat, {name}" for name in FLAT_MISTAKES] + [f"given, {name}" for name in GIVEN_MISTAKES],
)
def test_mistakes_are_named_when_the_source_is_opened(names, mistake, make, tmp_path):
    damage, fields, message = mistake
    damage(lay(tmp_path, names))
    data = make(tmp_path, **fields)
    expect_error(data, message.format(tmp_path), read=sources.open_source)


def test_a_missing_or_empty_folder_is_named(make, tmp_path):
    expect_error(make(tmp_path / "x"), f"{tmp_path}/x: no such folder", read=sources.open_source)
    expect_error(make(tmp_path), f"{tmp_path}: has no folders; put", read=sources.open_source)


def test_too_many_folders_are_a_mistake(make, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MOST_CLASSES", 2)
    data = make(lay(tmp_path, [*FLAT, "c/1.png"]))
    expect_error(data, f"{tmp_path}: has 3 classes, but 2", read=sources.open_source)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "link to nothing"])
def test_special_files_are_refused_when_the_source_is_opened(kind, make, tmp_path):
    make_special(kind, lay(tmp_path, FLAT) / "b" / "q_3.png")
    expect_error(make(tmp_path), f"{tmp_path}/b/q_3.png: is a", read=sources.open_source)


def test_links_to_pictures_and_folders_are_followed(make, tmp_path):
    plain, linked = lay(tmp_path / "plain", FLAT), tmp_path / "linked"
    (linked / "a").mkdir(parents=True)
    (linked / "b").symlink_to(plain / "b")
    for file in (plain / "a").iterdir():
        (linked / "a" / file.name).symlink_to(file)
    assert read(make(linked)) == read(make(plain))


@pytest.mark.parametrize("target", [".", "..", "../../b"])
def test_a_folder_that_is_reached_twice_is_named(target, make, tmp_path):
    lay(tmp_path, [*FLAT, "b/x/1.png"])
    (tmp_path / "b/x/again").symlink_to(target)
    message = f"{tmp_path}/b/x/again/: is the same folder as {tmp_path}/b/"
    expect_error(make(tmp_path), message, read=sources.open_source)


def test_names_that_are_not_text_are_named(make, tmp_path):
    lay(tmp_path, FLAT)
    os.rename(tmp_path / "b/q_3.png", os.fsencode(tmp_path) + b"/b/\xff.png")
    message = f"{tmp_path}/b/\\udcff.png: its name is not UTF-8"
    expect_error(make(tmp_path), message, read=sources.open_source)


def test_mixed_sizes_name_both_files(make, tmp_path):
    lay(tmp_path, GIVEN)
    Image.new("RGB", (40, 32)).save(tmp_path / "train/b/2.png")
    message = f"{tmp_path}/train/b/2.png: 40x32 pixels, unlike {tmp_path}/valid/a/1.png"
    expect_error(make(tmp_path), message, "config.data.patch_size", "config.data.resize")


def test_a_class_may_be_absent_from_valid_and_test_with_a_warning(make, tmp_path, caplog):
    lay(tmp_path, [*GIVEN, "train/c/1.png", "train/d/1.png", "test/d/1.png"])
    read(make(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        "test has no picture of 3 of the classes: a, b, c",
        "valid has no picture of 2 of the classes: c, d",
    ]


# --- stores


def test_stores_in_the_folder_are_no_classes(make, tmp_path):
    data = make(lay(tmp_path, FLAT), patch_size=96, resize="side")
    (tmp_path / "store_image_folder.tmp-host-1").mkdir()
    first = store.prepare(data)
    assert (tmp_path / "store_image_folder/manifest.json").is_file()
    data.store = str(tmp_path / "other")
    assert store.prepare(data)["content"] == first["content"]
    data.store = str(tmp_path / "third")
    assert store.prepare(data)["content"] == first["content"]


def write_real(pcam_dir: Path, folder: Path) -> None:
    """Writes the JPEG files that the shards hold, as they are, to SPLIT/CLASS/ID.jpg."""
    for shard in pcam_dir.glob("*.npz"):
        arrays = np.load(shard)
        content, ends = io.BytesIO(arrays["jpeg"].tobytes()), arrays["offsets"]
        sizes = np.diff(ends).tolist()
        for size, label, name in zip(sizes, arrays["labels"], arrays["ids"], strict=True):
            split, stem = str(name).split("/")
            path = folder / split / ("normal", "metastasis")[label] / f"{stem}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read(size))


@pytest.mark.slow
def test_real_jpegs_have_the_same_content_as_their_npz(pcam_dir, make_data, tmp_path):
    write_real(pcam_dir, tmp_path / "folder")
    script = [sys.executable, pcam_dir / "pcam_subset.py", "npz", tmp_path / "npz"]
    subprocess.run(script, check=True)
    folder = make_data("image_folder", tmp_path / "folder", classes=("normal", "metastasis"))
    expected = store.prepare(make_data("npz", tmp_path / "npz"))
    assert store.prepare(folder)["content"] == expected["content"]
