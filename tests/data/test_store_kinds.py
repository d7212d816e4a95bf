"""Stores of patches of any side, with any classes and groups; and those of the first format."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from bef_jax.configs import default
from bef_jax.data import splits, store
from bef_jax.data.patch import PCAM_CLASSES
from bef_jax.data.splits import check_store, open_splits
from bef_jax.errors import UserError
from tests.data.conftest import expect_error

CLASSES = ("fat", "stroma ❤", "tumour")


@pytest.fixture
def nine_patches():
    """Returns {split: arrays} with three classes at 40 pixels; each split has its own patients."""
    rng = np.random.default_rng(0)
    return {
        split: {
            "images": rng.integers(0, 256, (9, 40, 40, 3), np.uint8),
            "labels": np.arange(9) % 3,
            "groups": np.array([f"{split}{i % 2}" for i in range(9)]),
        }
        for split in ("train", "valid", "test")
    }


@pytest.fixture
def config(tmp_path):
    """Returns a configuration for the npz files of `tmp_path`."""
    config = default.get_config()
    config.model.num_classes = len(CLASSES)
    fields = {"source": "npz", "dir": str(tmp_path), "classes": CLASSES, "patch_size": 40}
    config.data.update(fields)
    return config


def write_npz(folder, splits):
    for name, arrays in splits.items():
        np.savez(Path(folder) / f"{name}.npz", **arrays)


def test_classes_sides_and_groups_come_back(config, nine_patches, tmp_path):
    write_npz(tmp_path, nine_patches)
    manifest = store.prepare(config.data)
    assert manifest["class_counts"] == {split: [3, 3, 3] for split in nine_patches}
    assert manifest["groups"] == {"train": 2, "valid": 2, "test": 2, "shared": 0}
    assert (manifest["patch_size"], manifest["mpp"]) == (40, None)
    for name, arrays in nine_patches.items():
        split = store.open_split(store.store_path(config.data), name)
        assert split.classes == CLASSES
        np.testing.assert_array_equal(split.images, arrays["images"])
        np.testing.assert_array_equal(split.labels, arrays["labels"])
        np.testing.assert_array_equal(split.groups, arrays["groups"])


def test_groups_of_two_splits_are_counted(config, nine_patches, tmp_path):
    nine_patches["valid"]["groups"] = nine_patches["train"]["groups"]
    write_npz(tmp_path, nine_patches)
    assert store.prepare(config.data)["groups"]["shared"] == 2


def test_the_content_checksum_is_of_pixels_and_labels(config, nine_patches, tmp_path):
    write_npz(tmp_path, nine_patches)
    arrays = nine_patches["train"]
    samples = [
        hashlib.sha256(image.tobytes()).digest()[:16] + bytes([label])
        for image, label in zip(arrays["images"], arrays["labels"], strict=True)
    ]
    expected = hashlib.sha256(b"".join(sorted(samples))).hexdigest()
    assert store.prepare(config.data)["content"]["train"] == expected


def test_a_store_of_the_first_format_is_read(make_data, write, patches, tmp_path):
    write("npz", tmp_path, patches)
    data = make_data("npz", tmp_path)
    store.prepare(data)
    file = store.store_path(data) / store.MANIFEST
    manifest = json.loads(file.read_text())
    # Version 1 had none of these; its `config` had no side and no classes either.
    for name in ("classes", "patch_size", "mpp", "groups"):
        del manifest[name]
    for name in ("classes", "patch_size"):
        del manifest["config"][name]
    file.write_text(json.dumps(manifest | {"format_version": 1}))
    assert store.prepare(data)["classes"] == ["normal", "metastasis"]
    split = store.open_split(store.store_path(data), "train")
    assert split.classes == ("normal", "metastasis") and split.groups is None
    np.testing.assert_array_equal(split.images, patches["train"][0])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("classes", ["a"], "classes"),
        ("classes", ["a", 1, "c"], "classes"),
        ("patch_size", "40", "patch_size"),
        ("patch_size", 41, "damaged"),
        ("mpp", "0.5", "mpp"),
        ("mpp", -1.0, "mpp"),
        ("groups", {"train": 2}, "shared"),
        ("class_counts", {"train": [9], "valid": [9], "test": [9]}, "class_counts"),
    ],
)
def test_a_wrong_kind_in_a_manifest_is_refused(
    config, nine_patches, tmp_path, name, value, message
):
    write_npz(tmp_path, nine_patches)
    manifest = store.prepare(config.data)
    path = store.store_path(config.data)
    (path / store.MANIFEST).write_text(json.dumps(manifest | {name: value}))
    expect_error(message, store.open_split, path, "train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.num_classes": 2}, "set --config.model.num_classes=3"),
        ({"data.patch_size": 64}, "the store has patches of 40 pixels"),
        ({"data.classes": CLASSES[::-1]}, "in the order of the network"),
        ({"data.mpp": 1.06}, "the store has 0.972 micrometres per pixel"),
    ],
)
def test_a_store_that_does_not_fit_the_network_is_refused(
    config, nine_patches, tmp_path, fields, message
):
    write_npz(tmp_path, nine_patches)
    manifest = store.prepare(config.data) | {"mpp": 0.972}
    check_store(config, manifest, config.data.classes)
    config.update_from_flattened_dict({"data.mpp": 1.04})  # 7 % more, as PCam's two scanners
    check_store(config, manifest, config.data.classes)
    config.update_from_flattened_dict(fields)
    expect_error(message, check_store, config, manifest, config.data.classes)


def test_a_name_at_another_place_is_refused_also_among_other_names(config, nine_patches, tmp_path):
    """The store's tumour would count as the network's fat, and every score would be turned."""
    write_npz(tmp_path, nine_patches)
    manifest = store.prepare(config.data)
    config.data.classes = ("tumour", "stroma ❤", "benign")
    expect_error("in the order of the network", check_store, config, manifest, config.data.classes)


def test_opening_fills_in_the_names_that_the_store_knows(config, nine_patches, tmp_path):
    write_npz(tmp_path, nine_patches)
    manifest = store.prepare(config.data)
    config.data.classes = ()
    assert tuple(splits._with_facts(config, manifest).data.classes) == CLASSES
    assert config.data.classes == ()


def test_groups_of_some_patches_only_are_refused(config, nine_patches, tmp_path):
    del nine_patches["valid"]["groups"]
    write_npz(tmp_path, nine_patches)
    expect_error("patches of valid have no group, but others have", store.prepare, config.data)
    assert not list(Path(tmp_path).glob("store*"))


def test_a_run_goes_on_with_the_configuration_that_its_store_filled_in(
    config, nine_patches, tmp_path
):
    for split in nine_patches.values():
        split["labels"] = split["labels"] % 2
    write_npz(tmp_path, nine_patches)
    config.update_from_flattened_dict({"data.classes": (), "model.num_classes": 2})
    config.data.mpp = 0.5
    opened, _ = open_splits(config)
    assert open_splits(opened)[0].data == opened.data
    named = opened.copy_and_resolve_references()
    named.data.classes = ("normal", "metastasis")
    open_splits(named)


def test_a_network_of_pcam_is_not_scored_on_labels_that_are_turned_around(
    config, nine_patches, tmp_path
):
    """Folders called metastasis and normal come in this order, and PCam's classes in the other."""
    for split in nine_patches.values():
        split["labels"] = split["labels"] % 2
    write_npz(tmp_path, nine_patches)
    config.data.classes = ("metastasis", "normal")
    manifest = store.prepare(config.data)
    network = default.get_config("data.patch_size=40")
    check_store(network, manifest, ())  # training takes the names as they are
    expect_error("classes are normal, metastasis", check_store, network, manifest, PCAM_CLASSES)


def test_other_names_of_as_many_classes_are_a_warning(config, nine_patches, tmp_path, caplog):
    write_npz(tmp_path, nine_patches)
    manifest = store.prepare(config.data)
    config.data.classes = ("a", "b", "c")
    check_store(config, manifest, config.data.classes)
    assert "called fat, stroma ❤, tumour, and not a, b, c" in caplog.text


def test_a_class_that_train_lacks_is_refused(config, nine_patches, tmp_path):
    for name in ("images", "labels", "groups"):
        arrays = nine_patches["train"]
        arrays[name] = arrays[name][np.arange(9) % 3 < 2]
    write_npz(tmp_path, nine_patches)
    expect_error("tumour is in the valid split but not in train", open_splits, config)


def test_opening_names_classes_and_scale_in_the_configuration(config, nine_patches, tmp_path):
    write_npz(tmp_path, nine_patches)
    config.data.mpp = 0.5
    opened, found = open_splits(config)
    assert tuple(opened.data.classes) == CLASSES and opened.data.mpp == 0.5
    assert list(found) == ["train", "valid", "test"]
    opened.data.patch_size = 50
    assert opened.rcc.max_size == 50, "the copy's references still follow"
    assert config.data.patch_size == 40, "and lead to the copy only"


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ("rpcam", {"patch_size": 64}, "patches of rpcam are 96x96"),
        ("synthetic", {"group": "P"}, "config.data.group is for the sources"),
        ("npz", {"resize": "side"}, "config.data.resize is for the sources"),
        ("pcam_hdf5", {"classes": CLASSES}, "pcam_hdf5 has 2 classes"),
        ("npz", {"classes": ("a", "a")}, "give two names or more, each once"),
        ("npz", {"classes": ("a",)}, "give two names or more, each once"),
        ("tfds", {"classes": ("metastasis", "normal")}, "label 0 of tfds is normal"),
    ],
)
def test_fields_that_are_not_for_a_source_are_refused(make_data, tmp_path, source, fields, message):
    with pytest.raises(UserError, match=message):
        store.prepare(make_data(source, tmp_path, **fields))
