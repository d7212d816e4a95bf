"""Compares what is read from each kind of input with the patches that were written."""

import gzip

import h5py
import numpy as np
import pytest
from PIL import Image

from bef_jax.data import inputs, store
from bef_jax.data.patch import Tiling
from bef_jax.errors import UserError
from tests.slides.slide_files import tissue_pixels, write_pyramid

PCAM = Tiling(96, 32, 32)


def random_patches(n, side=96):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def read(path, split=None, tiling=PCAM):
    inputs.check(path, split, tiling.side)
    return list(inputs.read(path, split, tiling))


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


@pytest.mark.parametrize("side", [32, 65, 224])
def test_arrays_of_any_side_are_read_by_a_network_that_has_it(side, tmp_path):
    images, tiling = random_patches(3, side), Tiling(side, side, side)
    np.savez(tmp_path / "a.npz", images=images)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = images
    for name in ("a.npz", "a.h5"):
        assert_patches(read(tmp_path / name, tiling=tiling), ["a_0", "a_1", "a_2"], images)
        with pytest.raises(UserError, match=rf"not uint8 \[3, {side}, {side}, 3\]"):
            inputs.check(tmp_path / name, None, 96)


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
        inputs.check(tmp_path / name, split, side=96)


@pytest.mark.parametrize(
    ("tiling", "tiles"),
    [(Tiling(64, 32, 32), 3 * 3), (Tiling(65, 65, 65), 2 * 1), (Tiling(32, 32, 64), 2 * 2)],
)
def test_a_picture_is_cut_as_the_network_needs(tiling, tiles, tmp_path):
    """The squares in the middle of the tiles have the picture's own pixels, up to its far end."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 65, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read(tmp_path, tiling=tiling)
    assert len(found) == tiles
    margin = (tiling.side - tiling.center) // 2
    for patch in found:
        square = patch.pixels[margin : margin + tiling.center, margin : margin + tiling.center]
        expected = pixels[patch.y : patch.y + tiling.center, patch.x : patch.x + tiling.center]
        np.testing.assert_array_equal(square, expected)
    assert (found[-1].y, found[-1].x) == (80 - tiling.center, 65 - tiling.center)


def test_a_picture_of_exactly_a_patch_is_read_as_it_is(tmp_path):
    for side in (32, 65, 224):
        image = random_patches(1, side)[0]
        Image.fromarray(image).save(tmp_path / "a.png")
        assert_patches(read(tmp_path, tiling=Tiling(side, side, side)), ["a.png"], [image])


def test_a_picture_smaller_than_a_patch_is_refused(tmp_path):
    Image.fromarray(random_patches(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: 96x96 pixels; .* 224x224"):
        inputs.check(tmp_path, None, 224)
    with pytest.raises(UserError, match=r"a\.png: 96x96 pixels; .* 224x224"):
        list(inputs.read(tmp_path, None, Tiling(224, 32, 32)))


def test_a_store_of_other_patches_is_refused(small_config):
    data = small_config().data
    store.prepare(data)
    with pytest.raises(UserError, match=r"are 96x96, but the network reads 64x64"):
        inputs.check(store.store_path(data), "test", 64)


def test_a_store_of_another_scale_is_refused(small_config):
    data = small_config().data
    data.mpp = 0.5
    data.store = f"{store.store_path(data)}_half"
    store.prepare(data)
    inputs.check(store.store_path(data), "test", 96, mpp=0.53)
    with pytest.raises(UserError, match=r"have 0\.5 um per pixel, but the network's have 0\.972"):
        inputs.check(store.store_path(data), "test", 96, mpp=0.972)


def test_slides_are_told_apart_from_pictures_and_stores(small_config, tmp_path):
    folder = tmp_path / "in"
    for name in ("b", "a/b"):
        (folder / name).mkdir(parents=True)
        write_pyramid(folder / name / "s.tif", tissue_pixels(300, 200), 0.972, (1, 2))
        Image.fromarray(random_patches(1)[0]).save(folder / name / "p.png")
    (folder / "broken.svs").write_bytes(b"")
    slides, rest = inputs.divide(folder, None, 96, 0.972)
    assert slides == [
        ("a/b/s", folder / "a/b/s.tif"),
        ("b/s", folder / "b/s.tif"),
        ("broken", folder / "broken.svs"),
    ]
    assert rest == [folder / "a/b/p.png", folder / "b/p.png"]
    found = [patch.id for patch in inputs.read(folder, None, PCAM, only=rest)]
    assert found == ["a/b/p.png", "b/p.png"]
    inputs.check(folder, None, 96, only=rest)
    assert inputs.divide(rest[0], None, 96) == ([], [rest[0]])
    assert inputs.divide(slides[0][1], None, 96) == ([("s", slides[0][1])], [])
    data = small_config().data
    store.prepare(data)
    np.savez(tmp_path / "a.npz", images=random_patches(1))
    for other in (store.store_path(data), tmp_path / "a.npz", tmp_path / "nowhere"):
        assert inputs.divide(other, None, 96) == ([], None)
    # A split of what is no store is an error of `check`.
    assert inputs.divide(folder, "test", 96) == ([], None)


def test_pictures_without_a_scale_are_counted_in_the_log(tmp_path, caplog):
    pixels = np.full((200, 120, 3), 200, np.uint8)
    for name in ("a.png", "b.tif", "patch.png"):
        Image.fromarray(pixels[:96, :96] if name == "patch.png" else pixels).save(tmp_path / name)
    with caplog.at_level("INFO"):
        inputs.check(tmp_path, None, 96)
        assert not caplog.records  # a network without a scale has nothing to compare
        inputs.check(tmp_path, None, 96, 0.972)
    (record,) = caplog.records
    assert "um per pixel: 2, the first is" in record.message and "a.png" in record.message
    assert "0.972" in record.message and "--config.slides.mpp" in record.message
