"""The drawn set of nine classes: its layout, and that a seed means the same pictures."""

import re

import numpy as np
from PIL import Image

from tests import tissue_kinds


def read(folder):
    return {str(f.relative_to(folder)): np.asarray(Image.open(f)) for f in folder.rglob("*.png")}


def test_a_folder_has_kinds_and_patients(tmp_path):
    tissue_kinds.write_folder(tmp_path / "a", 3, side=40, seed=5, groups=2)
    pictures = read(tmp_path / "a")
    assert {name.split("/")[0] for name in pictures} == tissue_kinds.KINDS.keys()
    assert {image.shape for image in pictures.values()} == {(40, 40, 3)}
    patients = [re.search(r"(?P<group>P\d+)_", name)["group"] for name in pictures]
    assert [patients.count(patient) for patient in ("P00", "P01")] == [18, 9]
    assert len({image.tobytes() for image in pictures.values()}) == 27


def test_a_longer_set_begins_with_the_shorter_one(tmp_path):
    for name, count, seed in (("a", 1, 5), ("b", 2, 5), ("c", 1, 6)):
        tissue_kinds.write_folder(tmp_path / name, count, side=40, seed=seed, groups=2)
    short, long, other = (read(tmp_path / name) for name in "abc")
    assert all(np.array_equal(long[name], image) for name, image in short.items())
    assert not any(np.array_equal(other[name], image) for name, image in short.items())
