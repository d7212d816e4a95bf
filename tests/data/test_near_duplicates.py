import io

import numpy as np
import pytest
from PIL import Image

from bef_jax.data import near_duplicates as near
from bef_jax.data.store import Split


def tissue(n, seed=0):
    """Patches with structure: noise on a grid of 8, enlarged."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 220, (n, 12, 12, 3)).astype(np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


def split(name, images):
    return Split(name, images, np.zeros(len(images), np.uint8), np.arange(len(images)).astype(str))


def encoded(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_search_is_exact_by_brute_force():
    rng = np.random.default_rng(0)
    others = rng.integers(0, 2**64, 500, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in rng.choice(64, k, replace=False)) for k in range(8)] * 20
    hashes = others[rng.integers(0, 500, len(flips))] ^ np.array(flips, np.uint64)
    distance = np.bitwise_count(hashes[:, None] ^ others[None]).min(axis=1)
    np.testing.assert_array_equal(near.has_near(hashes, others), distance <= near.RADIUS)
    assert 0 < (distance <= near.RADIUS).sum() < len(hashes)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: np.rot90(x, 1),
        lambda x: np.rot90(x, 3)[:, ::-1],
        lambda x: x[::-1],
        lambda x: encoded(x, 75),
        lambda x: (x * 0.8 + 10).astype(np.uint8),
    ],
)
def test_what_looks_alike_is_found(change, tmp_path):
    train = tissue(200)
    valid = np.concatenate([tissue(30, seed=1), np.stack([change(x) for x in train[:5]])])
    found = near.count(tmp_path, {"train": split("train", train), "valid": split("valid", valid)})
    assert found == {"valid": 5}


def test_background_is_not_taken_for_a_duplicate(tmp_path):
    blank = np.full((3, 96, 96, 3), 240, np.uint8)
    train = np.concatenate([tissue(20), blank])
    found = near.count(tmp_path, {"train": split("train", train), "valid": split("valid", blank)})
    assert found == {"valid": 0}


def test_means_are_of_the_luma():
    images = tissue(2)
    expected = np.asarray(
        Image.fromarray(images[0]).convert("L").resize((3, 3), Image.Resampling.BOX)
    )
    found = near.luma_grid(images)[0].reshape(3, 3, 3, 3).mean((1, 3))
    np.testing.assert_allclose(found, expected, atol=1.5)


def test_a_turned_patch_has_a_turned_grid():
    image = tissue(1)
    grid = near.luma_grid(image)
    views = list(near.symmetries(grid))
    assert len(views) == 8
    turned = near.luma_grid(np.rot90(image, 1, (1, 2)))
    np.testing.assert_allclose(views[2], turned, rtol=1e-6)


def test_counts_are_kept_for_the_same_splits(tmp_path):
    splits = {"train": split("train", tissue(20)), "test": split("test", tissue(10))}
    first = near.count(tmp_path, splits)
    assert first == {"test": 10}
    splits["train"].images[:] = 0  # would be noticed, were it read
    assert near.count(tmp_path, splits) == first
    fewer = splits | {"test": split("test", tissue(3))}
    assert near.count(tmp_path, fewer) == {"test": 0}
