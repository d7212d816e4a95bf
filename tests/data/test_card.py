import pytest

from bef_jax.data import store
from bef_jax.data.card import data_card


def card(config, **changes):
    store.prepare(config.data)
    folder = store.store_path(config.data)
    manifest = store.read_manifest(folder) | changes
    splits = {name: store.open_split(folder, name) for name in store.SPLITS}
    return dict(data_card(folder, manifest, splits))


def test_says_what_the_store_holds(small_config):
    config = small_config()
    found = card(config)
    valid = store.open_split(store.store_path(config.data), "valid")
    positive = int(valid.labels.sum())
    assert found["valid"] == f"{21 - positive} normal, {positive} with metastasis"
    assert "no slides" in found["do splits share slides?"]
    assert found["near duplicates, test"].startswith("0 (0.0%)")


@pytest.mark.parametrize(
    ("source", "word"),
    [("pcam_hdf5", "no:"), ("tfds", "no:"), ("rpcam", "yes:"), ("npz", "not kn")],
)
def test_a_random_split_is_not_passed_off_as_one_by_slides(source, word, small_config):
    assert card(small_config(), source=source)["do splits share slides?"].startswith(word)


def test_duplicates_are_added_up(small_config):
    duplicates = {
        "dropped_within": {"train": 3, "valid": 1, "test": 0},
        "dropped_across": {"train": 2, "valid": 0, "test": 0},
        "conflicting_labels": 1,
    }
    text = card(small_config(), duplicates=duplicates)["exact duplicates dropped"]
    assert text == "4 within splits, 2 across; 1 had contradicting labels"
