"""Finds patches of one split that look like patches of another: a score on them says less.

The store drops patches that are equal to the last bit. Here two patches are near duplicates if both
conditions hold under one of the eight flips and turns. Training augments with the same eight.

1. Their difference hashes (dHash: Krawetz, "Kind of like that", 2013) differ in at most `RADIUS`
   of 64 bits.
2. The difference of their grids of mean luma has a small standard deviation: at most `TOLERANCE`
   times that of the grid in the later split. The hash alone would match any two smooth slopes, such
   as bare glass. Flat patches are left out, because any two backgrounds look alike.

This finds a patch again in another encoding, brightness or turn. It does not find patches that
overlap after a shift of more than a few pixels. So a count of 0 does not prove that the splits
share no slide.
"""

import logging
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bef_jax.data.store import Split
from bef_jax.data.stored.rows import StoredRows, blocks
from bef_jax.errors import UserError
from bef_jax.runtime.files import check_types, read_json, write_json

LOG = logging.getLogger(__name__)

RADIUS = 3  # bits
TOLERANCE = 0.25  # 10% less contrast gives 0.1
FLAT = 4.0  # grey levels; a patch whose grid has a smaller deviation is background
FILE = "near_duplicates.json"
VERSION = 1  # of the definition of a near duplicate; results of another version are not used
LISTED = 100  # pairs of ids that a result names, for each pair of splits
_PARTS = 9  # the hash compares neighbours among 9 x 9 means
# A hash is cut into this many bands of 16 bits. If two hashes differ in fewer bits than there are
# bands, at least one band is equal (the pigeonhole principle). So RADIUS < _BANDS must hold.
_BANDS = 4
_MAX_CANDIDATES = 10**7  # pairs whose hashes are compared at once; limits the memory
_LUMA = (77, 150, 29)  # BT.601's, in whole 256ths
_EXACT = 16  # sums over parts of up to 16 x 16 pixels stay below 2^24, so float32 is exact


def across_splits(splits: Mapping[str, Split], folder: Path, content: str) -> dict[str, dict]:
    """Finds the near duplicates between all pairs of splits, or reads an earlier result.

    This takes some 10 s for PCam's 330,000 patches, in addition to reading them. So the result is
    kept.

    Args:
        splits: by name, in the order train, valid, test.
        folder: of the store, where the result is kept if it can be written.
        content: the store's checksum; a kept result of another content is not used.

    Returns:
        For each pair of splits, such as "train/valid": `patches`, how many patches of the later
        split have a near duplicate in the earlier one; and `pairs` of their ids, the nearest first,
        at most `LISTED`.
    """
    file, key = Path(folder) / FILE, {"version": VERSION, "content": content}
    wanted = {f"{first}/{second}": (first, second) for first, second in combinations(splits, 2)}
    kept = _read(file)
    if key.items() <= kept.items() and kept["found"].keys() == wanted.keys():
        return kept["found"]
    grids = {name: luma_grids(split.images) for name, split in splits.items()}
    found = {}
    for name, (first, second) in wanted.items():
        pairs = near_pairs(grids[first], grids[second])
        ids = [[str(splits[first].ids[i]), str(splits[second].ids[j])] for i, j in pairs[:LISTED]]
        found[name] = {"patches": len(np.unique(pairs[:, 1])), "pairs": ids}
    try:
        write_json(file, key | {"found": found})
    except OSError as error:  # a store that others share may be read-only
        LOG.warning("near duplicates cannot be kept, and will be looked for again: %s", error)
    return found


def _read(file: Path) -> dict[str, Any]:
    """Returns the kept result, or {} if it cannot be read: then the file is written again."""
    try:
        return read_json(file, _check, "it is made again")
    except FileNotFoundError:
        return {}
    except UserError as error:
        LOG.warning("%s", error)
        return {}


def _check(kept: Any) -> None:
    check_types(kept, version=int, content=str, found=dict)
    for near in kept["found"].values():
        check_types(near, patches=int, pairs=list)
        float(near["patches"])  # raises OverflowError if it is too large to be divided


def luma_grids(images: np.ndarray | StoredRows) -> np.ndarray:
    """Returns the mean luma of 9 x 9 parts of each uint8 patch, float32 [N, 9, 9] in 0 .. 255.

    The parts are as large as possible. Of a patch of 96 px, the central 90 x 90 are read.
    """
    grids = np.empty((len(images), _PARTS, _PARTS), np.float32)
    side = images.shape[1] // _PARTS
    # Sums must be exact, so that every machine finds the same pairs.
    dtype = np.float32 if side <= _EXACT else np.float64
    # [9 * side * 3, 9]: a product with it adds up the columns and the weighted channels of a part.
    columns = np.kron(np.eye(_PARTS), np.tile(_LUMA, side)[:, None]).astype(dtype)
    edge = (images.shape[1] - _PARTS * side) // 2
    inside = slice(edge, edge + _PARTS * side)
    for rows, block in blocks(images):
        pixels = block[:, inside, inside]
        # Add up the lines first, as integers, so that only a tenth of the numbers are converted.
        lines = pixels.reshape(len(pixels), _PARTS, side, -1).sum(2, dtype=np.uint16)
        grids[rows] = lines.astype(dtype) @ columns
    return grids / (256 * side**2)


def difference_hashes(grids: np.ndarray) -> np.ndarray:
    """Returns uint64 [N], one hash per grid of [N, 9, 9].

    Each bit says whether a part is darker than the next one: 32 bits compare along rows and 32
    along columns. With rows alone, as in Krawetz, forty times as many unrelated pairs of real
    patches lie within the radius.
    """
    # Take every second row and every second column, so that both fit into 64 bits.
    across = grids[:, :8:2, :-1] < grids[:, :8:2, 1:]  # [N, 4, 8]
    down = grids[:, :-1, :8:2] < grids[:, 1:, :8:2]  # [N, 8, 4]
    bits = np.concatenate([part.reshape(len(grids), 32) for part in (across, down)], axis=1)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def near_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the near duplicates among two splits' grids, [M, 9, 9] and [N, 9, 9].

    Returns:
        int [P, 2], rows of `first` and of `second`; each pair once, the nearest first.
    """
    hashes, best = difference_hashes(first), {}
    spreads = _standard_deviations(second)  # no symmetry changes them
    # Leave flat grids out before they are hashed, because thousands of them have the same hash.
    rows = np.flatnonzero(spreads >= FLAT)
    spreads = spreads[rows]
    for turned in _symmetries(second[rows]):
        for i, j in _within_radius(hashes, difference_hashes(turned)):
            gaps = _standard_deviations(first[i] - turned[j])
            for candidate in np.flatnonzero(gaps <= TOLERANCE * spreads[j]):
                pair = int(i[candidate]), int(rows[j[candidate]])
                best[pair] = min(best.get(pair, np.inf), float(gaps[candidate]))
    return np.array(sorted(best, key=lambda pair: (best[pair], pair)), int).reshape(-1, 2)


def _symmetries(grids: np.ndarray) -> Iterator[np.ndarray]:
    for turns in range(4):
        turned = np.rot90(grids, turns, (1, 2))
        yield turned
        yield turned[:, :, ::-1]


def _standard_deviations(grids: np.ndarray) -> np.ndarray:
    """Returns the standard deviation of each grid of [P, 9, 9], as [P]."""
    return grids.std((1, 2))


def _within_radius(
    first: np.ndarray, second: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows (i, j) of hashes that differ in at most `RADIUS` bits; a pair may repeat."""
    # A near pair has an equal band (`_BANDS`), so sorting by each band finds all candidates.
    # Comparing all 262,144 x 32,768 pairs would take minutes.
    for band in range(_BANDS):
        keys, wanted = (hashes.view(np.uint16)[band::_BANDS] for hashes in (first, second))
        order = np.argsort(keys, kind="stable")
        start, stop = (np.searchsorted(keys[order], wanted, side) for side in ("left", "right"))
        candidates = stop - start  # of each hash of `second`
        for rows in _row_blocks(candidates):
            counts = candidates[rows]
            j = np.repeat(np.arange(rows.start, rows.stop), counts)
            # 0, 1, 2, ... within each row's run of equal keys.
            offsets = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            i = order[np.repeat(start[rows], counts) + offsets]
            near = np.bitwise_count(first[i] ^ second[j]) <= RADIUS
            yield i[near], j[near]


def _row_blocks(candidates: np.ndarray) -> Iterator[slice]:
    """Yields slices of rows that have at most `_MAX_CANDIDATES` together, or one row with more."""
    before = np.append(0, candidates.cumsum())  # candidates of all rows before each one
    start = 0
    while start < len(candidates):
        last = np.searchsorted(before, before[start] + _MAX_CANDIDATES, "right") - 1
        stop = max(start + 1, int(last))
        yield slice(start, stop)
        start = stop
