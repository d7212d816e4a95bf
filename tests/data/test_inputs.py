"""Compares what is read from each kind of input with the patches that were written."""

import gzip

import h5py
import numpy as np
import pytest
from PIL import Image

from bef_jax.data import inputs, store
from bef_jax.errors import UserError


def random_patches(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)


def read(path, split=None, stride=32):
    inputs.check(path, split)
    return list(inputs.read(path, split, stride))


def assert_patches(found, ids, images):
    assert [patch.id for patch in found] == ids
    for patch, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(patch.pixels, image)
        assert patch.picture is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_needs_no_labels(save, tmp_path):
    images = random_patches(600)  # more than one chunk
    save(tmp_path / "a.npz", images=images)
    assert_patches(read(tmp_path / "a.npz"), [f"a_{row}" for row in range(600)], images)
    ids = [f"x,{row}" for row in range(3)]
    save(tmp_path / "b.npz", images=images[:3], ids=np.array(ids))
    assert_patches(read(tmp_path / "b.npz"), ids, images[:3])


def test_hdf5_is_read_packed_or_not(tmp_path):
    images = random_patches(5)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = images
    (tmp_path / "b.h5.gz").write_bytes(gzip.compress((tmp_path / "a.h5").read_bytes()))
    assert_patches(read(tmp_path / "a.h5"), [f"a_{row}" for row in range(5)], images)
    assert_patches(read(tmp_path / "b.h5.gz"), [f"b_{row}" for row in range(5)], images)


def test_a_store_is_read_by_split_or_whole(small_config):
    data = small_config().data
    store.prepare(data)
    path = store.store_path(data)
    for name in ("valid", "test"):
        split = store.open_split(path, name)
        assert_patches(read(path, name), split.ids.tolist(), split.images)
    assert len(read(path)) == sum(store.read_manifest(path)["counts"].values())


def test_a_folder_may_hold_patches_and_larger_pictures(tmp_path):
    image = random_patches(1)[0]
    (tmp_path / "b").mkdir()
    Image.fromarray(image).save(tmp_path / "b" / "one.png")
    Image.fromarray(np.tile(image, (1, 2, 1))).save(tmp_path / "wide.png")
    first, *tiles = read(tmp_path)
    assert_patches([first], ["b/one.png"], [image])
    assert len(tiles) == 3 * 6
    assert {tile.picture for tile in tiles} == {tmp_path / "wide.png"}
    assert tiles[-1].id == "wide.png:x=160:y=64"
    # The window of this tile lies inside the picture, so it shows the picture's own pixels.
    inner = next(tile for tile in tiles if (tile.y, tile.x) == (32, 32))
    np.testing.assert_array_equal(inner.pixels, image)
    assert [patch.id for patch in read(tmp_path / "b" / "one.png")] == ["one.png"]


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("nowhere", None, "no such file"),
        ("a.txt", None, "cannot be read as a picture"),
        ("one.png", "test", "only a store has splits"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_it_is_read(name, split, words, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    Image.fromarray(random_patches(1)[0]).save(tmp_path / "one.png")
    with pytest.raises(UserError, match=words):
        inputs.check(tmp_path / name, split)
