"""Tests stores that were edited, or made to do harm, and paths that cannot hold a store."""

import json
import os
import pathlib
import platform
import shutil

import numpy as np
import pytest

from bef_jax.data import sources, store
from bef_jax.runtime.files import sha256
from tests.data.conftest import expect_error


@pytest.fixture
def data(tmp_path, patches, write, make_data):
    return make_data("npz", write("npz", tmp_path / "raw", patches))


@pytest.fixture
def folder(data):
    store.prepare(data)
    return store.store_path(data)


@pytest.fixture
def source_is_not_read(monkeypatch):
    monkeypatch.setattr(sources, "open_source", lambda *_: pytest.fail("too late"))


def edit_manifest(folder, change):
    file = folder / store.MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def replace_array(folder, name, array):
    """Puts another array into the valid split, with the manifest's size and checksum right."""
    file = folder / "valid" / f"{name}.npy"
    np.save(file, array, allow_pickle=True)
    update_entry(folder, file)


def update_entry(folder, file):
    entry = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    edit_manifest(folder, lambda manifest: manifest["files"].update({f"valid/{file.name}": entry}))


# --- arrays


def ids(*names):
    return np.array([*names, *map(str, range(9 - len(names)))])


NO_CHARACTERS = (np.arange(9, dtype="u4") + 2**31).view("<U1")
ARRAYS = {
    "images in Fortran order": ("images", lambda x: np.asfortranarray(x), "in C order"),
    "images of floats": ("images", lambda x: x.astype("f4"), "images must be uint8"),
    "fewer images": ("images", lambda x: x[:8], "images are not the 9"),
    "label 2": ("labels", lambda x: x + 2, "label 2 in row 0"),
    "labels of text": ("labels", lambda x: x.astype("S9"), "labels must be numbers"),
    "ids that repeat": ("ids", lambda _: ids("a", "b", "a"), "a names 2 patches"),
    "a surrogate in an id": ("ids", lambda _: ids("a", "b\udfff"), "row 1 is not text"),
    "numbers as ids": ("ids", lambda _: np.arange(9, dtype="u4") + 2**31, "ids are uint32"),
    "codes of no character": ("ids", lambda _: NO_CHARACTERS, "row 0 is not text"),
    "long ids": ("ids", lambda _: ids("a" * 1025), "write one short text"),
    "objects as ids": ("ids", lambda x: x.astype("O"), "ids.npy holds objects"),
    "bytes as ids": ("ids", lambda x: x.astype("S"), "not text"),
}


@pytest.mark.parametrize("mistake", ARRAYS)
def test_an_array_that_prepare_would_not_write_is_refused(mistake, folder):
    name, change, message = ARRAYS[mistake]
    replace_array(folder, name, change(np.load(folder / "valid" / f"{name}.npy")))
    expect_error(message, store.open_split, folder, "valid")
    assert len(store.open_split(folder, "train")) == 20


def test_a_header_of_gigabytes_is_refused(folder, printed_by):
    file = folder / "valid" / "images.npy"
    with open(file, "wb") as stream:
        stream.write(b"\x93NUMPY\2\0\xff\xff\xff\x7f")
        stream.truncate(3 << 30)  # takes no room on the disk
    size = file.stat().st_size
    edit_manifest(folder, lambda manifest: manifest["files"]["valid/images.npy"].update(bytes=size))
    (told,) = printed_by(f"store.open_split(Path({str(folder)!r}), 'valid')")
    assert f"{folder / 'valid'}: damaged (a header of 2147483647 bytes is too long); delete" in told


# --- special files


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_an_array_that_is_not_a_regular_file_is_refused(
    kind, folder, special, printed_by, tmp_path
):
    code, starts = [], []
    for name in ("images", "labels", "ids"):
        path = tmp_path / name
        shutil.copytree(folder, path)
        special(kind, path / "valid" / f"{name}.npy")
        edit_manifest(path, lambda m, name=name: m["files"][f"valid/{name}.npy"].update(bytes=5))
        code.append(f"store.open_split(Path({str(path)!r}), 'valid')")
        code.append(f"store.verify(Path({str(path)!r}))")
        starts += [f"{path}/valid/{name}.npy: is {kind}", f"{path}/valid/{name}.npy: damaged"]
    for line, start in zip(printed_by(*code), starts, strict=True):
        assert line.startswith(start)


def test_an_array_of_0_bytes_in_the_manifest_is_refused(folder):
    # Some files of the system report size 0 but never end.
    edit_manifest(folder, lambda manifest: manifest["files"]["valid/ids.npy"].update(bytes=0))
    expect_error("valid/ids.npy is empty", store.open_split, folder, "valid")


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_a_manifest_that_is_not_a_regular_file_is_refused(kind, folder, special, printed_by, data):
    special(kind, folder / store.MANIFEST)
    told = printed_by(
        f"store.open_split(Path({str(folder)!r}), 'valid')",
        f"store.prepare(data_of('npz', {data.dir!r}))",
    )
    assert told[0] == f"{folder / store.MANIFEST}: is {kind}; name a regular file"
    assert "exists and is not a store" in told[1]


def test_a_file_outside_of_the_store_counts_as_damaged(folder, printed_by, special, tmp_path):
    special("a FIFO", tmp_path / "fifo")
    name = os.path.relpath(tmp_path / "fifo", folder)
    entry = {"bytes": 5, "sha256": "0" * 64}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))
    (told,) = printed_by(f"store.verify(Path({str(folder)!r}))")
    assert f"{folder / name}: damaged, because its sha256 is not" in told


# --- manifests


MANIFESTS = {
    "empty": b"",
    "cut": b"{",
    "a list": b"[]",
    "no field": b"{}",
    "only brackets": b"[" * 100_000,
    "not UTF-8": b'{"format_version": "\xff"}',
    "true as format": b'{"format_version": true}',
    "null": b"null",
}
FIELDS = {
    "no source": lambda m: m.pop("source"),
    "another source": lambda m: m.update(source="photographs"),
    "no count of test": lambda m: m["counts"].pop("test"),
    "a count of text": lambda m: m["counts"].update(train="20"),
    "an unknown split": lambda m: m["counts"].update(other=3),
    "one class count": lambda m: m["class_counts"].update(train=[20]),
    "class counts of text": lambda m: m["class_counts"].update(train=["10", "10"]),
    "no dropped_within": lambda m: m["duplicates"].pop("dropped_within"),
    "no conflicting_labels": lambda m: m["duplicates"].pop("conflicting_labels"),
    "a list as config": lambda m: m.update(config=[]),
    "a number as folder": lambda m: m["config"].update(dir=5),
    "no total content": lambda m: m["content"].update(total=None),
    "no file": lambda m: m["files"].pop("train/ids.npy"),
    "a number as file": lambda m: m["files"].update({"train/ids.npy": 5}),
    "no bytes": lambda m: m["files"]["train/ids.npy"].update(bytes=None),
}


@pytest.mark.parametrize("mistake", [*MANIFESTS, *FIELDS])
def test_a_damaged_manifest_is_refused(mistake, folder, data):
    if mistake in FIELDS:
        edit_manifest(folder, FIELDS[mistake])
    else:
        (folder / store.MANIFEST).write_bytes(MANIFESTS[mistake])
    for function, argument in ((store.read_manifest, folder), (store.prepare, data)):
        expect_error(f"delete {folder} and run --mode=prepare again", function, argument)


def test_a_long_folder_name_in_a_manifest_does_no_harm(folder, data):
    edit_manifest(folder, lambda manifest: manifest["config"].update(dir="a" * 5000))
    assert store.prepare(data)["counts"]["train"] == 20


# --- paths that cannot hold a store, which are refused before the source is read


def link_to_itself(path):
    path.symlink_to(path.name)
    return path


PLACES = {
    "a file": lambda path: path.touch() or path,
    "below a file": lambda path: path.touch() or path / "store",
    "a link to itself": link_to_itself,
    "below a link to itself": lambda path: link_to_itself(path) / "store",
    "a long name": lambda path: path / ("a" * 300),
    "the home of no user": lambda _: "~nosuchuser/store",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("field", ["store", "dir"])
@pytest.mark.usefixtures("source_is_not_read")
def test_a_path_that_cannot_hold_a_store_is_refused_before_reading(field, place, data, tmp_path):
    data[field] = str(PLACES[place](tmp_path / "place"))
    expect_error(data[field], store.prepare, data)


@pytest.mark.usefixtures("source_is_not_read")
def test_a_name_that_gets_too_long_for_a_temporary_folder_is_refused(data, tmp_path):
    data.store = str(tmp_path / "new" / ("a" * 250))
    expect_error("File name too long", store.prepare, data)


@pytest.mark.usefixtures("source_is_not_read")
def test_a_read_only_disk_is_refused_before_reading(data, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    expect_error(
        "cannot be written (Read-only file system); set config.data.store", store.prepare, data
    )


def test_a_link_to_a_store_is_followed(data, tmp_path):
    data.store = str(tmp_path / "link")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "store")
    (tmp_path / "disk").mkdir()
    manifest = store.prepare(data)
    assert (tmp_path / "link").is_symlink()
    assert store.read_manifest(tmp_path / "disk" / "store") == manifest == store.prepare(data)


@pytest.mark.usefixtures("source_is_not_read")
def test_a_mount_point_is_refused_before_reading(data, tmp_path, monkeypatch):
    data.store = str(tmp_path / "mount")
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: pathlib.Path(path).name == "mount")
    expect_error("name another config.data.store", store.prepare, data)


@pytest.mark.parametrize("pid", ["9" * 30, "²", "0x1", ""])
def test_a_folder_whose_name_ends_in_no_process_number_stays(pid, data):
    other = pathlib.Path(data.dir) / f"store_npz.tmp-{platform.node()}-{pid}"
    other.mkdir()
    store.prepare(data)
    assert other.exists()


def test_a_source_with_repeated_ids_makes_no_store(data, tmp_path, monkeypatch):
    def open_source(*args):
        return real(*args)._replace(chunks=renamed(real(*args).chunks))

    def renamed(chunks):
        for split, chunk in chunks:
            yield split, chunk._replace(ids=np.full(len(chunk.ids), "same"))

    real = sources.open_source
    monkeypatch.setattr(sources, "open_source", open_source)
    expect_error("ids of test: same names 7 patches", store.prepare, data)
    assert not list(pathlib.Path(data.dir).glob("store*"))
