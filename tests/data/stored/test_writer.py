"""Compares what is kept and counted with brute force, for patches in random orders."""

import itertools
import threading

import numpy as np
import pytest

from bef_jax.data.chunk import Chunk
from bef_jax.data.patch import SPLITS
from bef_jax.data.stored.writer import MAX_REPORTED, Duplicates, StoreWriter

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


def chunk_of(value):
    images = np.full((3, 8, 8, 3), value, np.uint8)
    images[:, 0, 0, 0] = range(3)
    ids = np.array([f"{value}_{row}" for row in range(3)])
    return Chunk(images, np.zeros(3, np.uint8), ids)


def test_an_error_while_writing_reaches_the_caller(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with StoreWriter(tmp_path, True, 8, 2) as writer:
        writer.add("train", chunk_of(1))
        monkeypatch.setattr(Duplicates, "keeps", fail)
        with pytest.raises(OSError, match="No space left"):
            for value in range(2, 5):
                writer.add("train", chunk_of(value))
        with pytest.raises(OSError, match="No space left"):
            writer.close()


def test_at_most_one_chunk_waits(tmp_path, monkeypatch):
    begun, go = [], threading.Event()

    def write(writer, split, chunk):
        begun.append(chunk.ids[0])
        assert go.wait(10)

    monkeypatch.setattr(StoreWriter, "_write", write)
    with StoreWriter(tmp_path, True, 8, 2) as writer:
        writer.add("train", chunk_of(1))  # returns while it is being written
        added = threading.Thread(target=writer.add, args=("train", chunk_of(2)))
        added.start()
        added.join(0.2)
        assert added.is_alive()
        go.set()
        added.join(10)
    assert begun == ["1_0", "2_0"]
