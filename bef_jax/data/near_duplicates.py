"""Patches of one split that look like patches of another: a score on them says less.

The store drops what is equal to the last bit. Here a patch is a near duplicate of another if their
difference hashes (dHash, N. Krawetz 2013) differ in at most `RADIUS` of 64 bits, under any of the
eight flips and turns, which training shows as well. The hash bears another encoding, brightness
and contrast; it does not see patches that overlap after a shift by more than a few pixels.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bef_jax.data.chunk import ranges
from bef_jax.data.store import Split
from bef_jax.summary import write_json

LOG = logging.getLogger(__name__)

RADIUS = 3  # one bit fewer than there are bands, so that one band of two near hashes is equal
_BANDS = 4  # of 16 bits each
FILE = "near_duplicates.json"  # in the store's folder
FLAT = 4.0  # grey levels: a patch of less deviation is background, and like any other
_GRID = 9  # the hash compares neighbours on 9 x 9 means
# Of red, green and blue, in ITU-R BT.601's luma.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def count(folder: Path, splits: dict[str, Split]) -> dict[str, int]:
    """Counts the patches of valid and test with a near duplicate in train, flat ones aside.

    The counts are kept in the store's folder, since reading PCam for them takes a minute.
    """
    file, sizes = folder / FILE, {name: len(split) for name, split in splits.items()}
    try:
        kept = json.loads(file.read_text())
        if kept["sizes"] == sizes:
            return kept["counts"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never counted, or of another store
    train = _hashes(splits["train"], views=False)[0]
    others = [name for name in ("valid", "test") if name in splits]
    counts = {name: _count_near(splits[name], train) for name in others}
    try:
        write_json(file, {"sizes": sizes, "counts": counts})
    except OSError as error:  # a store that others own
        LOG.info("%s: not kept (%s)", file, error)
    return counts


def _count_near(split: Split, train: np.ndarray) -> int:
    near = np.zeros(len(split), bool)
    for view in _hashes(split, views=True):
        near |= has_near(view, train) & (view != 0)
    return int(near.sum())


def _hashes(split: Split, views: bool) -> list[np.ndarray]:
    """uint64 [N] for each of the eight views, or of the first; 0 where a patch is flat."""
    chunks = [luma_grid(split.images[rows]) for rows in ranges(len(split))]
    grid = np.concatenate(chunks)
    flat = grid.std((1, 2)) < FLAT
    turned = symmetries(grid) if views else [grid]
    return [np.where(flat, np.uint64(0), difference_hashes(each)) for each in turned]


def symmetries(grid: np.ndarray) -> Iterator[np.ndarray]:
    """The eight flips and turns of [N, S, S]."""
    for turns in range(4):
        turned = np.rot90(grid, turns, (1, 2))
        yield turned
        yield turned[:, :, ::-1]


def luma_grid(images: np.ndarray) -> np.ndarray:
    """Mean luma of 9 x 9 parts of each patch, float32 [N, 9, 9], of uint8 [N, H, W, 3]."""
    edges = np.linspace(0, images.shape[1], _GRID + 1).round().astype(int)
    sizes = np.diff(edges).astype(np.float32)
    # Summed in whole numbers first: a quarter of the bytes, and the same on every machine.
    rows = np.add.reduceat(images, edges[:-1], axis=1, dtype=np.uint32)
    sums = np.add.reduceat(rows, edges[:-1], axis=2)
    return sums @ _LUMA / np.outer(sizes, sizes)


def difference_hashes(grid: np.ndarray) -> np.ndarray:
    """uint64 [N], of mean lumas [N, 9, 9]: bit by bit whether a part is darker than the next.

    32 comparisons go along the rows and 32 along the columns, so that a transposed patch is as far
    from others as an upright one.
    """
    across = (grid[:, ::2, :-1] < grid[:, ::2, 1:])[:, :4]
    down = (grid[:, :-1, ::2] < grid[:, 1:, ::2])[:, :, :4]
    bits = np.concatenate([part.reshape(len(grid), -1) for part in (across, down)], axis=1)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def has_near(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each hash, uint64 [N], has one of `others`, uint64 [M], within RADIUS bits.

    Exact, by the pigeonhole principle: of hashes that differ in three bits, one of four bands is
    equal, so that only those with an equal band are compared.
    """
    near = np.zeros(len(hashes), bool)
    for band in range(_BANDS):
        own, theirs = (_band(values, band) for values in (hashes, others))
        order = np.argsort(theirs, kind="stable")
        sorted_bands, candidates = theirs[order], others[order]
        first = np.searchsorted(sorted_bands, own, "left")
        last = np.searchsorted(sorted_bands, own, "right")
        for row in np.flatnonzero(~near & (first < last)):
            differing = np.bitwise_count(candidates[first[row] : last[row]] ^ hashes[row])
            near[row] = (differing <= RADIUS).any()
    return near


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    return (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
