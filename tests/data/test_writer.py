"""Compares what is kept and counted with brute force, for patches in random orders."""

import itertools

import numpy as np
import pytest

from bef_jax.data.patch import SPLITS
from bef_jax.data.writer import MAX_REPORTED, Duplicates

SEEN = [
    (bytes([digest]), split, label, f"{split}_{row}")
    for row, (digest, split, label) in enumerate(itertools.product(range(3), SPLITS, (0, 1)))
]


@pytest.mark.parametrize("rectify", [True, False])
def test_the_first_of_equal_patches_stays_in_any_order(rectify):
    for seed in range(20):
        order = [SEEN[i] for i in np.random.default_rng(seed).permutation(len(SEEN))]
        duplicates = Duplicates(rectify)
        kept = [patch for patch in order if duplicates.keeps(*patch)]
        firsts = {digest: rest for digest, *rest in reversed(order)}
        assert kept == ([p for p in order if firsts[p[0]] == list(p[1:])] if rectify else order)
        found = duplicates.summary()
        later = [p for p in order if firsts[p[0]] != list(p[1:])]
        within = [split for digest, split, *_ in later if firsts[digest][0] == split]
        across = [split for digest, split, *_ in later if firsts[digest][0] != split]
        for key, splits in (("dropped_within", within), ("dropped_across", across)):
            assert found[key] == {split: splits.count(split) * rectify for split in SPLITS}
        conflicts = [[firsts[p[0]][2], p[3]] for p in later if firsts[p[0]][1] != p[2]]
        assert (found["conflicting_labels"], found["conflicts"]) == (len(conflicts), conflicts)


def test_a_manifest_names_at_most_a_hundred_conflicts():
    duplicates = Duplicates(rectify=True)
    for row in range(2 * MAX_REPORTED):
        duplicates.keeps(b"same", "train", row % 2, str(row))
    found = duplicates.summary()
    assert found["conflicting_labels"] == MAX_REPORTED == len(found["conflicts"])
    for row in range(2):
        duplicates.keeps(b"same", "train", 1, str(row))
    found = duplicates.summary()
    assert found["conflicting_labels"] == MAX_REPORTED + 2
    assert len(found["conflicts"]) == MAX_REPORTED
