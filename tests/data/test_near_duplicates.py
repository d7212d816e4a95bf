"""Compares near pairs with brute force over all pairs, and with patches that were changed."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from bef_jax.data import near_duplicates
from bef_jax.data.near_duplicates import (
    RADIUS,
    TOLERANCE,
    across_splits,
    luma_grids,
    near_pairs,
)
from tests.data.conftest import make_split


def smooth_patches(n, seed):
    """Returns smooth random patches: 12 x 12 colours, enlarged."""
    colours = np.random.default_rng(seed).integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((96, 96))) for c in colours])


def as_jpeg(image, quality=60):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_grid_is_the_mean_luma_of_each_part():
    images = smooth_patches(3, 0)
    luma = images[:, 3:93, 3:93] @ np.array([77, 150, 29]) / 256
    expected = [[luma[2, 10 * r : 10 * r + 10, 10 * c : 10 * c + 10].mean() for c in range(9)]
                for r in range(9)]  # fmt: skip
    np.testing.assert_allclose(luma_grids(images)[2], expected, rtol=1e-6)


@pytest.mark.parametrize(("side", "part"), [(32, 3), (97, 10), (153, 17), (512, 56)])
def test_parts_of_other_patches_are_as_large_as_possible(side, part):
    images = np.random.default_rng(side).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    images[0] = 255
    first, found = (side - 9 * part) // 2, luma_grids(images)
    assert (found[0] == 255).all() and 9 * (part + 1) > side
    for r in range(9):
        for c in range(9):
            top, left = first + part * r, first + part * c
            pixels = images[1, top : top + part, left : left + part].reshape(-1, 3)
            total = sum(int(x) for x in pixels.astype(np.int64) @ np.array([77, 150, 29]))
            assert found[1, r, c] == np.float32(total) / (256 * part**2)


def hash_bits(grid):
    """Returns the 64 bits of a difference hash, found with loops."""
    across = [grid[r, c] < grid[r, c + 1] for r in range(0, 8, 2) for c in range(8)]
    down = [grid[r, c] < grid[r + 1, c] for r in range(8) for c in range(0, 8, 2)]
    return np.array(across + down)


def brute_force(first, second):
    """Returns {pair: bits that differ} of all pairs that the tolerance allows.

    The pairs are compared one by one, under the eight symmetries; the fewest bits count.
    """
    hashes, distances = np.array([hash_bits(grid) for grid in first]), {}
    for j, grid in enumerate(second):
        for k in range(8):
            turned = np.rot90(grid.T if k >= 4 else grid, k % 4)
            gaps = first - turned
            rms = np.sqrt(((gaps - gaps.mean((1, 2), keepdims=True)) ** 2).mean((1, 2)))
            distance = (hashes != hash_bits(turned)).sum(1)
            for i in np.flatnonzero(rms <= TOLERANCE * turned.std()).tolist():
                distances[i, j] = min(distances.get((i, j), 64), distance[i])
    return distances


def test_near_pairs_finds_what_brute_force_over_all_pairs_finds():
    """Uses grids of little contrast: many pairs lie within the radius, and many just outside."""
    rng = np.random.default_rng(0)
    slope = np.add.outer(np.arange(9.0), 2 * np.arange(9.0))
    first, second = (slope + s * rng.normal(size=(n, 9, 9)) for n, s in ((100, 0.6), (80, 0.5)))
    found, distances = near_pairs(first, second), brute_force(first, second)
    expected = {pair for pair, distance in distances.items() if distance <= RADIUS}
    assert set(map(tuple, found.tolist())) == expected
    assert len(found) == len(expected) > 500
    assert list(distances.values()).count(RADIUS + 1) > 500


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        as_jpeg,
        lambda x: np.rot90(x),
        lambda x: x.transpose(1, 0, 2),
        lambda x: (x * 0.9 + 12).astype(np.uint8),
    ],
    ids=["equal", "jpeg", "turned", "transposed", "paler"],
)
def test_a_changed_patch_is_found_again(change):
    train, valid = smooth_patches(40, 1), smooth_patches(20, 2)
    valid[7] = change(train[31])
    assert near_pairs(luma_grids(train), luma_grids(valid)).tolist() == [[31, 7]]


def test_slopes_of_very_different_steepness_are_not_near_duplicates():
    slope = np.add.outer(np.arange(9.0), 2 * np.arange(9.0))[None]
    assert len(near_pairs(slope, 1.1 * slope)) == 1
    assert len(near_pairs(slope, 5 * slope)) == 0


@pytest.mark.parametrize(("deviation", "pairs"), [(0, 0), (1, 0), (3, 0), (5, 1)])
def test_background_is_not_a_near_duplicate(deviation, pairs):
    """Compares a grid with itself, so that only a small deviation can keep it from being found."""
    pattern = np.random.default_rng(0).normal(size=(1, 9, 9))
    grids = 240 + deviation * pattern / pattern.std()
    assert len(near_pairs(grids, grids)) == pairs


def test_flat_patches_are_not_compared(monkeypatch):
    """Thousands of blank patches have one hash, so comparing them would take long."""
    blank = np.full((5, 96, 96, 3), 240, np.uint8)
    train, valid = smooth_patches(4, 1), smooth_patches(4, 2)
    valid[2] = train[3]
    compared = []

    def within_radius(first, second):
        compared.append(len(second))
        return find(first, second)

    find = near_duplicates._within_radius
    monkeypatch.setattr(near_duplicates, "_within_radius", within_radius)
    grids = luma_grids(np.concatenate([blank, valid]))
    assert near_pairs(luma_grids(np.concatenate([blank, train])), grids).tolist() == [[8, 7]]
    assert compared == [4] * 8  # in each symmetry


def test_few_candidates_are_held_at_once(monkeypatch):
    """All of them are in rows that follow each other, as those of one slide do in a split."""
    monkeypatch.setattr(near_duplicates, "_MAX_CANDIDATES", 50)
    hashes = np.array([7] * 20 + [2**63 - 1] * 60, np.uint64)
    other = np.array([7] * 30 + [0x5555_5555_5555_5555] * 600 + [2**63 - 1], np.uint64)
    blocks = list(near_duplicates._within_radius(hashes, other))
    assert {(int(i), int(j)) for block in blocks for i, j in zip(*block, strict=True)} == (
        {(i, j) for i in range(20) for j in range(30)} | {(i, 630) for i in range(20, 80)}
    )
    # A row of 7s has 20 candidates, so two of them fit into 50. The last row has 60 candidates, and
    # is a block by itself.
    assert {len(j) for _, j in blocks if len(set(j.tolist())) > 1} == {40}
    assert max(len(j) for _, j in blocks) == 60


def test_patches_of_the_later_split_are_counted_and_the_result_is_kept(tmp_path, monkeypatch):
    train, valid, test = smooth_patches(30, 1), smooth_patches(20, 2), smooth_patches(10, 3)
    valid[[3, 5]], train[8] = train[4], train[4]  # each of the two in valid is twice in train
    splits = {"train": make_split("train", train), "valid": make_split("valid", valid)}
    splits["test"] = make_split("test", test)
    found = across_splits(splits, tmp_path, "abc")
    assert {name: seen["patches"] for name, seen in found.items()} == {
        "train/valid": 2, "train/test": 0, "valid/test": 0,
    }  # fmt: skip
    assert ["train_4", "valid_3"] in found["train/valid"]["pairs"]
    with monkeypatch.context() as patch:
        patch.setattr(near_duplicates, "luma_grids", lambda _: pytest.fail("looked again"))
        assert across_splits(splits, tmp_path, "abc") == found
    splits["valid"] = make_split("valid", smooth_patches(20, 2))
    assert across_splits(splits, tmp_path, "other")["train/valid"]["patches"] == 0


KEY = {"version": near_duplicates.VERSION, "content": "abc"}


@pytest.mark.parametrize(
    "kept",
    [
        "[1]", "3", "null", "{}", "", "{", "\0\0", "[" * 100_000,
        *(
            json.dumps(KEY | {"found": found})
            for found in (
                3, [], {}, {"train/valid": 3}, {"train/valid": {"patches": "4", "pairs": []}},
                {"train/valid": {"patches": 4}}, {"train/valid": {"patches": 4, "pairs": None}},
                {"train/valid": {"patches": 10**400, "pairs": []}},
                {"valid/test": {"patches": 4, "pairs": []}}, {"x": {"patches": 4, "pairs": []}},
            )
        ),
    ],
)  # fmt: skip
def test_a_damaged_kept_result_is_made_again(kept, tmp_path):
    splits = {name: make_split(name, smooth_patches(4, 1)) for name in ("train", "valid")}
    file = tmp_path / near_duplicates.FILE
    file.write_text(kept)
    found = across_splits(splits, tmp_path, "abc")
    assert found["train/valid"]["patches"] == 4
    assert json.loads(file.read_text()) == KEY | {"found": found}


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_a_kept_result_that_is_not_a_regular_file_is_not_waited_for(kind, tmp_path, caplog):
    splits = {name: make_split(name, smooth_patches(4, 1)) for name in ("train", "valid")}
    file = tmp_path / near_duplicates.FILE
    {"FIFO": os.mkfifo, "folder": os.mkdir, "device": lambda x: x.symlink_to("/dev/zero")}[kind](
        file
    )
    assert across_splits(splits, tmp_path, "abc")["train/valid"]["patches"] == 4
    assert f"is a {kind}" in caplog.text
    if kind == "folder":
        assert "will be looked for again" in caplog.text
    else:
        assert json.loads(file.read_text())["content"] == "abc"


def test_a_store_that_cannot_be_written_is_still_searched(tmp_path):
    splits = {name: make_split(name, smooth_patches(4, 1)) for name in ("train", "valid")}
    found = across_splits(splits, tmp_path / "missing", "abc")
    assert found["train/valid"]["patches"] == 4
