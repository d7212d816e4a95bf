"""Compares rows of the data card with texts and counts that are written out here."""

import pytest

from bef_jax.data import near_duplicates, store
from bef_jax.data.card import data_card
from bef_jax.data.patch import SPLITS


def card(config, **changes):
    store.prepare(config.data)
    folder = store.store_path(config.data)
    manifest = store.read_manifest(folder) | changes
    splits = {name: store.open_split(folder, name) for name in SPLITS}
    return dict(data_card(folder, manifest, splits))


def test_card_says_what_the_store_holds(small_config):
    config = small_config()
    found = card(config)
    valid = store.open_split(store.store_path(config.data), "valid")
    positive = int(valid.labels.sum())
    assert found["valid"] == f"{21 - positive} normal, {positive} with metastasis"
    assert "no slides" in found["do splits share slides?"]
    assert found["near duplicates, test and train"].startswith("0 (0.0%)")


@pytest.mark.parametrize(
    ("source", "answer"),
    [("pcam_hdf5", "no:"), ("tfds", "no:"), ("rpcam", "yes:"), ("npz", "not known")],
)
def test_a_random_split_is_not_passed_off_as_one_by_slides(source, answer, small_config):
    assert card(small_config(), source=source)["do splits share slides?"].startswith(answer)


PCAM_COUNTS = {"train": 262_144, "valid": 32_768, "test": 32_768}


@pytest.mark.parametrize(
    ("source", "counts", "expected"),
    [
        ("pcam_hdf5", PCAM_COUNTS, "published scores on PCam"),
        ("tfds", PCAM_COUNTS | {"valid": 32_767}, "32,767 of 32,768 valid patches"),
        ("pcam_hdf5", PCAM_COUNTS | {"test": 0}, "not with published scores"),
        ("rpcam", PCAM_COUNTS, "not with those on PCam"),
        ("npz", PCAM_COUNTS, "the same files"),
        ("synthetic", PCAM_COUNTS, "the same synthetic patches"),
    ],
)
def test_card_says_what_a_score_can_be_compared_with(source, counts, expected, small_config):
    found = card(small_config(), source=source, counts=counts)
    assert expected in found["a score can be compared with"]


def test_pcam_without_its_duplicates_is_still_all_of_pcam(small_config):
    dropped = {"train": 0, "valid": 1, "test": 0}
    duplicates = {"dropped_within": dropped, "dropped_across": dropped, "conflicting_labels": 0}
    changes = {"counts": PCAM_COUNTS | {"valid": 32_766}, "duplicates": duplicates}
    found = card(small_config(), source="pcam_hdf5", **changes)
    assert found["a score can be compared with"].startswith("published scores")


def test_near_duplicates_of_every_pair_of_splits_are_counted(small_config, monkeypatch):
    pairs = {"train/valid": {"patches": 7, "pairs": []}, "train/test": {"patches": 0, "pairs": []}}
    pairs["valid/test"] = {"patches": 1, "pairs": []}
    monkeypatch.setattr(near_duplicates, "across_splits", lambda *_: pairs)
    found = card(small_config())
    assert found["near duplicates, valid and train"] == "7 (33.3%) of valid, turned or not"
    assert found["near duplicates, test and valid"] == "1 (7.7%) of test, turned or not"


def test_exact_duplicates_of_all_splits_are_added_up(small_config):
    duplicates = {
        "dropped_within": {"train": 3, "valid": 1, "test": 0},
        "dropped_across": {"train": 2, "valid": 0, "test": 0},
        "conflicting_labels": 1,
    }
    text = card(small_config(), duplicates=duplicates)["exact duplicates dropped"]
    assert text == "4 within splits, 2 across; 1 had contradicting labels"


@pytest.mark.parametrize(
    ("shared", "answer"),
    [
        (0, "no: each group is in one split (12 of train, 4 of valid)"),
        (3, "yes: 3 groups are in several splits; a score is higher than on new slides"),
    ],
)
def test_groups_say_whether_splits_share_slides(small_config, shared, answer):
    groups = {"train": 12, "valid": 4, "test": 0, "shared": shared}
    assert card(small_config(), groups=groups)["do splits share slides?"] == answer


def test_classes_are_named_unless_they_are_many(small_config):
    counts = {"train": [5, 6, 0], "valid": [1, 2, 3], "test": [0, 0, 0]}
    found = card(small_config(), classes=["a", "b", "c"], class_counts=counts)
    assert found["train"] == "5 a, 6 b, 0 c" and "test" not in found
    counts = {"train": [5, 0] * 20, "valid": [1] * 40, "test": [0] * 40}
    found = card(small_config(), classes=[str(i) for i in range(40)], class_counts=counts)
    assert found["train"] == "100 of 20 classes, 0 to 5 of each"


def test_the_scale_is_that_of_the_store(small_config):
    assert card(small_config(), mpp=0.5)["scale"] == "0.5 um per pixel"
    assert card(small_config(), mpp=None)["scale"] == "not known"
