"""Each source, compared with the random patches that were written in its layout."""

import subprocess
import sys
import tracemalloc

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from bef_jax.data import sources
from bef_jax.data.sources import rpcam
from tests.data.sources.conftest import expect_error


def read_all(data):
    """Returns {split: (images, labels, ids)} of all chunks, in the order of reading."""
    found = {}
    for split, chunk in sources.open_source(data).chunks:
        found.setdefault(split, []).append(chunk)
    return {
        split: tuple(
            np.concatenate(parts) for parts in zip(*(chunk[:3] for chunk in chunks), strict=True)
        )
        for split, chunks in found.items()
    }


DESCRIBE_SOURCES = """
import sys
from bef_jax.configs.default import get_config
from bef_jax.data import sources

data = get_config().data
for data.source in sources.SOURCES:
    assert sources.identity(data) and sources.describe(data.source).comparable
libraries = {"h5py", "huggingface_hub", "PIL", "pooch", "pyarrow", "requests", "tifffile"}
libraries |= {"tensorflow_datasets"}
print(*libraries & sys.modules.keys())
"""


def test_a_source_is_described_without_importing_the_libraries_that_it_reads_with():
    ran = subprocess.run(
        [sys.executable, "-c", DESCRIBE_SOURCES], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "\n"


@pytest.mark.parametrize("layout", ["pcam_hdf5", "pcam_hdf5_gz", "npz"])
def test_split_sources_give_back_what_was_written(layout, tmp_path, patches, write, make_data):
    folder = write(layout, tmp_path / "raw", patches)
    before = sorted(folder.iterdir())
    found = read_all(make_data(layout.removesuffix("_gz"), folder))
    assert list(found) == ["test", "valid", "train"]
    for split, (images, labels) in patches.items():
        np.testing.assert_array_equal(found[split][0], images)
        np.testing.assert_array_equal(found[split][1], labels)
        assert found[split][2][3].endswith(f"{split}_3")
        assert found[split][1].dtype == np.uint8
    assert sorted(folder.iterdir()) == before  # unpacked copies are gone


@pytest.mark.parametrize("layout", ["pcam_hdf5", "npz"])
def test_the_test_split_may_be_absent_and_sizes_keep_the_first_patches(
    layout, tmp_path, patches, write, make_data
):
    del patches["test"]
    folder = write(layout, tmp_path, patches)
    found = read_all(make_data(layout, folder, train_size=5, valid_size=1000))
    assert list(found) == ["valid", "train"]
    np.testing.assert_array_equal(found["train"][0], patches["train"][0][:5])
    assert len(found["valid"][1]) == 9


@pytest.mark.parametrize("layout", ["pcam_hdf5", "npz"])
def test_chunks_are_small(layout, tmp_path, write, make_data):
    images = np.zeros((1100, 96, 96, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(1100) % 256
    tiny = (images[:1], np.ones(1, np.uint8))
    folder = write(layout, tmp_path, {"train": (images, np.zeros(1100, np.uint8)), "valid": tiny})
    chunks = [
        chunk
        for split, chunk in sources.open_source(make_data(layout, folder)).chunks
        if split == "train"
    ]
    assert [len(chunk.labels) for chunk in chunks] == [512, 512, 76]
    np.testing.assert_array_equal(np.concatenate([chunk.images for chunk in chunks]), images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_needs_memory_for_a_few_chunks_only(save, tmp_path, make_data):
    images = np.zeros((4096, 96, 96, 3), np.uint8)
    for split in ("train", "valid"):
        save(tmp_path / f"{split}.npz", images=images, labels=np.zeros(4096, np.int64))
    del images
    tracemalloc.start()
    for _ in sources.open_source(make_data("npz", tmp_path)).chunks:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4096 * 96 * 96 * 3 / 2  # of eight chunks, it holds little more than two


@pytest.mark.parametrize("kind", [str, bytes])
def test_npz_keeps_its_ids(kind, tmp_path, patches, make_data):
    for split, (images, labels) in patches.items():
        ids = np.asarray([f"{split}-{i}" for i in range(len(labels))]).astype(
            "S16" if kind is bytes else "U16"
        )
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels, ids=ids)
    assert read_all(make_data("npz", tmp_path))["valid"][2][2] == "valid-2"


# --- Kaggle's layout


def test_rpcam_reads_every_patch_once_with_its_label(tmp_path, patches, write, make_data):
    folder = write("rpcam", tmp_path, patches)
    found = read_all(make_data("rpcam", folder, split_ratio=(0.5, 0.3, 0.2)))
    expected = {
        image.tobytes(): label
        for images, labels in patches.values()
        for image, label in zip(images, labels, strict=True)
    }
    read = {
        image.tobytes(): label
        for images, labels, _ in found.values()
        for image, label in zip(images, labels, strict=True)
    }
    assert read == expected


def test_rpcam_reads_a_reordered_table_of_a_spreadsheet_the_same(
    tmp_path, patches, write, make_data
):
    folder = write("rpcam", tmp_path, patches)
    data = make_data("rpcam", folder, split_ratio=(0.5, 0.3, 0.2))
    before = read_all(data)
    head, *rows = (folder / "train_labels.csv").read_text().splitlines()
    shuffled = "\r\n".join([head, *reversed(rows)]) + "\r\n"
    (folder / "train_labels.csv").write_bytes(b"\xef\xbb\xbf" + shuffled.encode())
    after = read_all(data)
    for split in before:
        for one, other in zip(before[split], after[split], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_split_depends_only_on_the_ratio_and_the_id():
    names = [f"patch{i}" for i in range(20000)]
    splits = [rpcam.split_of(name, (0.7, 0.2, 0.1)) for name in names]
    shares = [splits.count(split) / len(names) for split in ("train", "valid", "test")]
    # The tolerance is five standard deviations of a binomial share of 20,000.
    np.testing.assert_allclose(shares, (0.7, 0.2, 0.1), atol=5 * np.sqrt(0.25 / 20000))
    assert splits == [rpcam.split_of(name, (7, 2, 1)) for name in names]
    assert "test" not in {rpcam.split_of(name, (0.7, 0.3, 0)) for name in names}
    # A split whose share grows keeps all patches that it had.
    grown = [rpcam.split_of(name, (0.8, 0.1, 0.1)) for name in names]
    assert all(new == "train" for old, new in zip(splits, grown, strict=True) if old == "train")


def test_rpcam_decodes_with_tifffile_what_pillow_cannot(tmp_path, patches, write):
    folder = write("rpcam", tmp_path, patches)
    path = min((folder / "train").iterdir())
    pixels = tifffile.imread(path)
    tifffile.imwrite(path, pixels, compression="jpegxl", compressionargs={"lossless": True})
    with pytest.raises(OSError):
        Image.open(path).load()
    np.testing.assert_array_equal(rpcam._decode(path), pixels)


# --- mistakes: the error is one line, and names the file or the field


def overwrite_train(folder, **arrays):
    for name, array in arrays.items():
        with h5py.File(folder / f"camelyonpatch_level_2_split_train_{name}.h5", "w") as file:
            file[name] = array


def zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


HDF5_MISTAKES = {
    "wrong side": ({"x": zeros(20, 64, 64, 3)}, "train_x.h5: images must be uint8"),
    "wrong channels": ({"x": zeros(20, 96, 96, 4)}, "train_x.h5: images must be uint8"),
    "wrong type": ({"x": zeros(20, 96, 96, 3, dtype=np.float32)}, "float32"),
    "empty": ({"x": zeros(0, 96, 96, 3), "y": zeros(0, 1, 1, 1)}, "train_x.h5: holds no patch"),
    "fewer labels": (
        {"y": zeros(19, 1, 1, 1)},
        "train_y.h5: labels are uint8 [19, 1, 1, 1] for 20",
    ),
    "two labels each": (
        {"y": zeros(10, 2, 1, 1)},
        "train_y.h5: labels are uint8 [10, 2, 1, 1] for 20",
    ),
    "label 2": ({"y": zeros(20, 1, 1, 1) + 2}, "train_y.h5: label 2 in row 0"),
    "label 0.5": ({"y": zeros(20, 1, 1, 1) + 0.5}, "train_y.h5: label 0.5 in row 0"),
}


@pytest.mark.parametrize("mistake", HDF5_MISTAKES)
def test_hdf5_mistakes_are_named(mistake, tmp_path, patches, write, make_data):
    folder = write("pcam_hdf5", tmp_path, patches)
    arrays, message = HDF5_MISTAKES[mistake]
    overwrite_train(folder, **arrays)
    expect_error(make_data("pcam_hdf5", folder), message)


@pytest.mark.parametrize(
    ("layout", "missing"),
    [
        ("pcam_hdf5", "camelyonpatch_level_2_split_valid_x.h5"),
        ("pcam_hdf5", "camelyonpatch_level_2_split_test_y.h5"),  # half a split
        ("npz", "valid.npz"),
        ("rpcam", "train_labels.csv"),
    ],
)
def test_a_missing_file_is_named(layout, missing, tmp_path, patches, write, make_data):
    folder = write(layout, tmp_path, patches)
    (folder / missing).unlink()
    expect_error(make_data(layout, folder), f"{folder / missing}")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("pcam_hdf5", "camelyonpatch_level_2_split_train_x.h5"),
        ("pcam_hdf5_gz", "camelyonpatch_level_2_split_train_x.h5.gz"),
        ("npz", "train.npz"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_named(layout, name, damage, tmp_path, patches, write, make_data):
    folder = write(layout, tmp_path, patches)
    whole = (folder / name).read_bytes()
    wrong = {"cut": whole[: len(whole) // 2], "text": b"not found" * 99, "empty": b""}[damage]
    (folder / name).write_bytes(wrong)
    expect_error(make_data(layout.removesuffix("_gz"), folder), f"{folder / name}: cannot be read")
    assert not list(folder.glob("tmp*"))


def test_hdf5_without_its_data_set_is_refused(tmp_path, patches, write, make_data):
    folder = write("pcam_hdf5", tmp_path, patches)
    with h5py.File(folder / "camelyonpatch_level_2_split_valid_x.h5", "w") as file:
        file["images"] = patches["valid"][0]
    expect_error(
        make_data("pcam_hdf5", folder),
        "valid_x.h5: has no data set 'x'; name images x and labels y",
    )


NPZ_MISTAKES = {
    "no images": ({"labels": zeros(3)}, "train.npz: cannot be read"),
    "no labels": ({"images": zeros(3, 96, 96, 3)}, "train.npz: cannot be read"),
    "labels that need pickle": (
        {"images": zeros(3, 96, 96, 3), "labels": np.asarray([0, 1, None])},
        "train.npz (labels): object [3]; labels must be numbers",
    ),
    "Fortran order": (
        {"images": np.asfortranarray(zeros(3, 96, 96, 3)), "labels": zeros(3)},
        "Fortran order",
    ),
    "ids that repeat": (
        {"images": zeros(3, 96, 96, 3), "labels": zeros(3), "ids": np.asarray(["a", "b", "b"])},
        "train.npz (ids): b names 2 patches",
    ),
    "too few ids": (
        {"images": zeros(3, 96, 96, 3), "labels": zeros(3), "ids": np.asarray(["a"])},
        "train.npz (ids): ids are <U1 [1] for 3 images",
    ),
    "float images": (
        {"images": zeros(3, 96, 96, 3, dtype=np.float32), "labels": zeros(3)},
        "train.npz (images): images must be uint8",
    ),
}


@pytest.mark.parametrize("mistake", NPZ_MISTAKES)
def test_npz_mistakes_are_named(mistake, tmp_path, patches, write, make_data):
    folder = write("npz", tmp_path, patches)
    arrays, message = NPZ_MISTAKES[mistake]
    np.savez(folder / "train.npz", **arrays)
    expect_error(make_data("npz", folder), message)


def edit_table(change):
    def edit(folder):
        table = folder / "train_labels.csv"
        table.write_text("\n".join(change(table.read_text().splitlines())) + "\n")

    return edit


def save_first(image):
    return lambda folder: image.save(min((folder / "train").iterdir()), format="tiff")


RPCAM_MISTAKES = {
    "label 2": (edit_table(lambda t: [*t[:1], t[1][:-1] + "2", *t[2:]]), "csv line 2: label '2'"),
    "no label": (edit_table(lambda t: [*t[:1], t[1][:-2], *t[2:]]), "csv line 2: label None"),
    "no header": (edit_table(lambda t: t[1:]), "its first line must be id,label"),
    "row twice": (edit_table(lambda t: [*t, t[3]]), "has an earlier row"),
    "no rows": (edit_table(lambda t: t[:1]), "names no patch"),
    "row missing": (edit_table(lambda t: t[:-1]), "has no row for it"),
    "file missing": (lambda f: min((f / "train").iterdir()).unlink(), ": train has no file "),
    "damaged": (lambda f: min((f / "train").iterdir()).write_bytes(b"no"), ".tif: cannot be read"),
    "64x32": (save_first(Image.new("RGB", (64, 32))), ".tif: 64x32 pixels; cut or resample it"),
    "gray": (save_first(Image.new("L", (96, 96))), ".tif: images must be RGB"),
}


@pytest.mark.parametrize("mistake", RPCAM_MISTAKES)
def test_rpcam_mistakes_are_named(mistake, tmp_path, patches, write, make_data):
    folder = write("rpcam", tmp_path, patches)
    damage, message = RPCAM_MISTAKES[mistake]
    damage(folder)
    expect_error(make_data("rpcam", folder, split_ratio=(0.5, 0.3, 0.2)), message)


@pytest.mark.parametrize("ratio", [(1.0, 0.0, 0.0), (0.9, -0.1, 0.2), (0.999998, 1e-6, 1e-6)])
def test_rpcam_ratio_that_leaves_a_split_empty_is_refused(
    ratio, tmp_path, patches, write, make_data
):
    folder = write("rpcam", tmp_path, patches)
    expect_error(make_data("rpcam", folder, split_ratio=ratio), "config.data.split_ratio")


def test_an_unknown_source_and_a_size_of_0_are_refused(tmp_path, make_data):
    expect_error(make_data("imagenet", tmp_path), "config.data.source: unknown source 'imagenet'")
    expect_error(make_data("npz", tmp_path, valid_size=0), "config.data.valid_size is 0")
