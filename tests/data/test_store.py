"""Compares stores with the patches that their source was given, and with each other."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bef_jax.data import sources, store
from bef_jax.data.stored.rows import StoredRows
from tests.data.conftest import expect_error

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def npz_data(tmp_path, patches, write, make_data):
    return make_data("npz", write("npz", tmp_path / "raw", patches))


@pytest.mark.smoke
def test_store_holds_what_the_source_gave(npz_data, patches):
    manifest = store.prepare(npz_data)
    path = store.store_path(npz_data)
    assert path == Path(npz_data.dir) / "store_npz"
    for name, (images, labels) in patches.items():
        split = store.open_split(path, name)
        assert len(split) == len(labels) == manifest["counts"][name]
        assert isinstance(split.images, StoredRows)
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.ids[1] == f"npz_{name}_1"
        assert manifest["class_counts"][name] == np.bincount(labels, minlength=2).tolist()
        np.testing.assert_array_equal(np.load(path / name / "images.npy"), images)
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((path / name).read_bytes()).hexdigest()


def test_second_prepare_does_not_read_the_source(npz_data):
    first = store.prepare(npz_data)
    for file in Path(npz_data.dir).glob("*.npz"):
        file.unlink()
    assert store.prepare(npz_data) == first == store.read_manifest(store.store_path(npz_data))


def test_moved_store_is_still_accepted_without_its_source(npz_data, tmp_path):
    first = store.prepare(npz_data)
    shutil.move(store.store_path(npz_data), tmp_path / "moved")
    shutil.rmtree(npz_data.dir)
    npz_data.store = str(tmp_path / "moved")
    assert store.prepare(npz_data) == first


@pytest.mark.parametrize(
    ("field", "value"), [("train_size", 5), ("rectify", False), ("source", "pcam_hdf5")]
)
def test_store_made_with_other_fields_is_refused(field, value, npz_data):
    npz_data.store = str(Path(npz_data.dir) / "s")
    store.prepare(npz_data)
    npz_data[field] = value
    expect_error(f"config.data.{field} is {value!r}", store.prepare, npz_data)


def test_store_made_from_another_folder_is_refused(npz_data, tmp_path, patches, write):
    npz_data.store = str(tmp_path / "s")
    store.prepare(npz_data)
    npz_data.dir = str(write("npz", tmp_path / "other", patches))
    expect_error("config.data.dir is", store.prepare, npz_data)


def test_seed_and_split_ratio_may_change_if_the_source_ignores_them(npz_data):
    first = store.prepare(npz_data)
    npz_data.seed = 7
    npz_data.split_ratio = (0.5, 0.25, 0.25)
    assert store.prepare(npz_data) == first


def test_synthetic_variants_do_not_collide(make_data, tmp_path):
    paths = {
        store.store_path(make_data("synthetic", tmp_path, **fields))
        for fields in ({}, {"seed": 1}, {"train_size": 9}, {"test_size": 9})
    }
    assert len(paths) == 4
    explicit = make_data("synthetic", tmp_path, train_size=4096, valid_size=1024)
    path = store.store_path(make_data("synthetic", tmp_path))
    assert store.store_path(explicit) == path == tmp_path / "store_synthetic_4096_1024_1024_0"


# --- content and duplicates


def contents(data):
    return store.prepare(data)["content"]


def test_layouts_of_the_same_patches_have_the_same_content(tmp_path, patches, write, make_data):
    found = {
        layout: contents(
            make_data(layout.removesuffix("_gz"), write(layout, tmp_path / layout, patches))
        )
        for layout in ("pcam_hdf5", "pcam_hdf5_gz", "npz")
    }
    kaggle = make_data(
        "rpcam", write("rpcam", tmp_path / "rpcam", patches), split_ratio=(0.5, 0.3, 0.2)
    )
    assert found["npz"] == found["pcam_hdf5"] == found["pcam_hdf5_gz"]
    assert contents(kaggle)["total"] == found["npz"]["total"]
    assert contents(kaggle)["train"] != found["npz"]["train"]


def test_content_ignores_order_but_not_a_pixel_or_a_label(tmp_path, patches, write, make_data):
    def content_of(name, change):
        changed = {
            split: (images.copy(), labels.copy()) for split, (images, labels) in patches.items()
        }
        images, labels = changed["valid"]
        changed["valid"] = change(images, labels)
        return contents(make_data("npz", write("npz", tmp_path / name, changed)))

    def one_pixel(images, labels):
        images[4, 50, 50, 1] ^= 1
        return images, labels

    def one_label(images, labels):
        labels[4] ^= 1
        return images, labels

    plain = content_of("plain", lambda images, labels: (images, labels))
    assert content_of("order", lambda images, labels: (images[::-1], labels[::-1])) == plain
    for name, change in (("pixel", one_pixel), ("label", one_label)):
        other = content_of(name, change)
        assert other["train"] == plain["train"]
        assert other["valid"] != plain["valid"]
        assert other["total"] != plain["total"]


@pytest.fixture
def duplicated(patches):
    """Returns patches with four duplicates of train: two within it, one in valid, one in test.

    One of those within train has another label.
    """
    train, valid, test = (patches[split] for split in ("train", "valid", "test"))
    for row, (images, labels), source in (
        (10, train, 3),
        (11, train, 3),
        (2, valid, 5),
        (6, test, 7),
    ):
        images[row], labels[row] = train[0][source], train[1][source]
    labels = train[1]
    labels[11] = 1 - labels[3]
    return patches


@pytest.mark.smoke
def test_rectify_drops_duplicates_from_train_first(tmp_path, duplicated, write, make_data):
    data = make_data("npz", write("npz", tmp_path, duplicated))
    manifest = store.prepare(data)
    assert manifest["counts"] == {"train": 16, "valid": 9, "test": 7}
    assert manifest["duplicates"]["dropped_within"] == {"train": 2, "valid": 0, "test": 0}
    assert manifest["duplicates"]["dropped_across"] == {"train": 2, "valid": 0, "test": 0}
    assert manifest["duplicates"]["conflicting_labels"] == 1
    assert manifest["duplicates"]["conflicts"] == [["npz_train_3", "npz_train_11"]]
    train = store.open_split(store.store_path(data), "train")
    kept = [row for row in range(20) if row not in (5, 7, 10, 11)]
    np.testing.assert_array_equal(train.images, duplicated["train"][0][kept])
    assert train.ids.tolist() == [f"npz_train_{row}" for row in kept]


def test_without_rectify_everything_stays(tmp_path, duplicated, write, make_data):
    manifest = store.prepare(make_data("npz", write("npz", tmp_path, duplicated), rectify=False))
    assert manifest["counts"] == {"train": 20, "valid": 9, "test": 7}
    assert sum(manifest["duplicates"]["dropped_within"].values()) == 0
    assert manifest["duplicates"]["conflicting_labels"] == 1


def test_split_of_nothing_but_duplicates_is_refused(tmp_path, patches, write, make_data):
    patches["valid"] = patches["test"]
    data = make_data("npz", write("npz", tmp_path, patches))
    expect_error("no patch is left in the valid split, out of 7 read", store.prepare, data)
    assert not list(tmp_path.glob("store*"))


# --- interruption and damage


def test_interrupted_prepare_leaves_no_files(npz_data, monkeypatch):
    def open_source(*args):
        return real(*args)._replace(chunks=interrupted(real(*args).chunks))

    def interrupted(chunks):
        yield from list(chunks)[:2]
        raise KeyboardInterrupt

    real = sources.open_source
    monkeypatch.setattr(sources, "open_source", open_source)
    with pytest.raises(KeyboardInterrupt):
        store.prepare(npz_data)
    assert not list(Path(npz_data.dir).glob("store*"))
    monkeypatch.undo()
    assert store.prepare(npz_data)["counts"]["train"] == 20


def test_folders_of_ended_processes_are_removed_and_those_of_others_stay(npz_data):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    prefix = f"store_npz.tmp-{platform.node()}-"
    folders = {
        pid: Path(npz_data.dir) / f"{prefix}{pid}"
        for pid in (ended.pid, os.getpid(), os.getppid(), f"2-{ended.pid}")
    }
    for folder in folders.values():
        folder.mkdir()
        (folder / "images.npy").touch()
    store.prepare(npz_data)
    assert not folders[ended.pid].exists()
    assert not folders[os.getpid()].exists()
    assert folders[os.getppid()].exists()
    assert folders[f"2-{ended.pid}"].exists()  # of another host, whose name begins like ours


PREPARE = """
import os, signal, sys
from bef_jax.data import store
from bef_jax.configs.default import get_config
data = get_config().data
data.update({"source": "npz", "dir": sys.argv[1]})
store.prepare(data, BEGIN)
"""


def test_kill_while_writing_leaves_no_store(npz_data, caplog):
    kill = "lambda n: name == 'reading train' and os.kill(os.getpid(), signal.SIGKILL)"
    code = PREPARE.replace("BEGIN", f"lambda name, *_: {kill}")
    ran = subprocess.run([sys.executable, "-c", code, npz_data.dir], cwd=ROOT)
    assert ran.returncode == -9
    (left,) = Path(npz_data.dir).glob("store_npz.tmp-*")
    expect_error("no store there", store.open_split, store.store_path(npz_data), "train")
    with caplog.at_level("INFO", logger="bef_jax"):
        store.prepare(npz_data)
    assert not left.exists()
    assert f"{left}: removed" in caplog.text and "starts from the beginning" in caplog.text


def test_store_that_another_process_made_meanwhile_is_used(npz_data, monkeypatch):
    def open_source(*args):
        return real(*args)._replace(chunks=then_another(real(*args).chunks))

    def then_another(chunks):
        yield from chunks
        code = PREPARE.replace("BEGIN", "store.silent")
        subprocess.run([sys.executable, "-c", code, npz_data.dir], cwd=ROOT, check=True)

    real = sources.open_source
    monkeypatch.setattr(sources, "open_source", open_source)
    assert store.prepare(npz_data)["counts"]["train"] == 20
    assert len(store.open_split(store.store_path(npz_data), "train")) == 20
    assert not list(Path(npz_data.dir).glob("store_npz.tmp-*"))


def test_foreign_folder_is_left_alone(npz_data):
    path = store.store_path(npz_data)
    path.mkdir()
    (path / "thesis.tex").touch()
    expect_error("exists and is not a store", store.prepare, npz_data)
    assert (path / "thesis.tex").exists()


def test_missing_source_leaves_no_folder(make_data, tmp_path):
    expect_error("no such file", store.prepare, make_data("npz", tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_missing_store_and_missing_split_are_refused(npz_data, patches, tmp_path):
    expect_error("run --mode=prepare", store.open_split, tmp_path / "none", "train")
    (Path(npz_data.dir) / "test.npz").unlink()
    manifest = store.prepare(npz_data)
    assert manifest["counts"]["test"] == 0
    expect_error("has no test split", store.open_split, store.store_path(npz_data), "test")


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["images", "labels", "ids"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_damaged_array_is_refused(name, damage, npz_data):
    store.prepare(npz_data)
    path = store.store_path(npz_data)
    damage(path / "valid" / f"{name}.npy")
    expect_error(f"{name}.npy", store.open_split, path, "valid")
    assert len(store.open_split(path, "train")) == 20


def test_array_without_a_header_is_refused(npz_data):
    store.prepare(npz_data)
    file = store.store_path(npz_data) / "valid" / "images.npy"
    file.write_bytes(b"x" * file.stat().st_size)
    expect_error("damaged", store.open_split, store.store_path(npz_data), "valid")


@pytest.mark.parametrize("version", [0, 7])
def test_store_of_another_format_is_refused_even_if_its_manifest_has_other_fields(
    version, npz_data
):
    store.prepare(npz_data)
    path = store.store_path(npz_data)
    (path / store.MANIFEST).write_text(json.dumps({"format_version": version, "shards": 4}))
    for function, argument in ((store.read_manifest, path), (store.prepare, npz_data)):
        expect_error(f"store format {version}, but this version reads 2", function, argument)


def test_progress_of_every_long_piece_of_work_reaches_its_total(npz_data):
    begun, done = {}, Counter()

    def begin(name, total, unit):
        begun[name] = (total, unit)
        return lambda amount: done.update({name: amount})

    files = store.prepare(npz_data, begin)["files"]
    store.verify(store.store_path(npz_data), begin)
    size = sum(entry["bytes"] for entry in files.values())
    counts = {"test": 7, "valid": 9, "train": 20}
    assert begun == {
        **{f"reading {split}": (count, "patches") for split, count in counts.items()},
        "checking files (sha256)": (size, "bytes"),
        "verifying": (size, "bytes"),
    }
    assert done == {name: total for name, (total, _) in begun.items()}


# --- memory


def peak_bytes(folder, count):
    """Returns the peak resident memory of preparing `count` different patches from npz."""
    folder.mkdir()
    images = np.zeros((count, 96, 96, 3), np.uint8)
    images.reshape(count, -1)[:, :8] = np.arange(count, dtype=np.int64)[:, None].view(np.uint8)
    np.savez(folder / "train.npz", images=images, labels=np.zeros(count, np.uint8))
    np.savez(folder / "valid.npz", images=~images[:1], labels=np.zeros(1, np.uint8))
    measure = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    code = PREPARE.replace("BEGIN", "store.silent") + measure
    command = [sys.executable, "-c", code, folder]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    manifest = json.loads((folder / "store_npz" / store.MANIFEST).read_text())
    assert manifest["counts"]["train"] == count
    return int(ran.stdout) * 1024


def test_memory_of_prepare_does_not_grow_with_the_images(tmp_path):
    small, large = 2048, 8192
    growth = peak_bytes(tmp_path / "b", large) - peak_bytes(tmp_path / "a", small)
    # An image has 27,648 bytes; its label, id and digests take a few hundred.
    assert growth / (large - small) < 2048


# --- real patches


@pytest.mark.slow
def test_real_patches_have_the_same_content_in_three_layouts(pcam_dir, tmp_path, make_data):
    found = {}
    for layout, source in (("hdf5", "pcam_hdf5"), ("kaggle", "rpcam"), ("npz", "npz")):
        script = [sys.executable, pcam_dir / "pcam_subset.py", layout, tmp_path / layout]
        subprocess.run([*script, "--limit", "400"], check=True, capture_output=True)
        found[source] = store.prepare(make_data(source, tmp_path / layout))
    assert found["npz"]["content"] == found["pcam_hdf5"]["content"]
    assert found["rpcam"]["content"]["total"] == found["npz"]["content"]["total"]
    assert found["npz"]["counts"] == {"train": 400, "valid": 400, "test": 0}
