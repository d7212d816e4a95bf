"""Compares the classes that are counted before the first step with counts made by hand."""

import numpy as np
import pytest

from bef_jax.configs import default
from bef_jax.data.splits import check_classes, open_splits
from bef_jax.errors import UserError
from tests.data.conftest import make_split


def check(**labels):
    blank = np.zeros((3, 96, 96, 3), np.uint8)
    check_classes({name: make_split(name, blank[: len(y)], y) for name, y in labels.items()})


def test_the_classes_of_each_split_are_counted(caplog):
    with caplog.at_level("INFO"):
        check(train=[0, 1, 1], valid=[0, 1], test=[1, 1, 0])
    assert caplog.messages == [
        "train split: 1 normal, 2 metastasis",
        "valid split: 1 normal, 1 metastasis",
        "test split: 1 normal, 2 metastasis",
    ]


@pytest.mark.parametrize(
    ("labels", "counts"),
    [([0] * 3, "3 normal, 0 metastasis"), ([1] * 3, "0 normal, 3 metastasis")],
)
def test_a_train_split_of_one_class_is_refused(labels, counts):
    with pytest.raises(UserError, match=rf"^config.data: train split: {counts}: .* both$"):
        check(train=labels, valid=[0, 1])


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", ["valid", "test"])
def test_a_valid_or_test_split_of_one_class_is_a_warning(name, label, caplog):
    splits = {"train": [0, 1], "valid": [0, 1], "test": [0, 1]} | {name: [label] * 2}
    with caplog.at_level("WARNING"):
        check(**splits)
    (line,) = caplog.messages
    assert line.startswith(f"{name}: all 2 patches are of class {label}, so AUC")


def test_a_store_of_one_class_is_refused_when_it_is_opened(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), np.uint8)
    for name, rows, labels in (("train", slice(4), [0] * 4), ("valid", slice(4, 6), [0, 1])):
        np.savez(tmp_path / f"{name}.npz", images=images[rows], labels=np.uint8(labels))
    config = default.get_config(f"data.source=npz,data.dir={tmp_path}")
    with pytest.raises(UserError, match="train split: 4 normal, 0 metastasis"):
        open_splits(config)
