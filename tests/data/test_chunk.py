"""What is looked at before an array is read; what a read array holds is in test_sources.py."""

import numpy as np
import pytest

from bef_jax.data import chunk
from bef_jax.errors import UserError


def test_ids_may_take_so_much_memory_as_the_patches_allow():
    wide = np.dtype("U1000")
    chunk.check_id_array((60_000,), wide, 60_000, 0, "a")
    with pytest.raises(UserError, match="a: 70000 ids of 1000 characters; write shorter ids"):
        chunk.check_id_array((70_000,), wide, 70_000, 0, "a")
    # Bytes become text, of four bytes a character.
    with pytest.raises(UserError, match="write shorter ids"):
        chunk.check_id_array((70_000,), np.dtype("S1000"), 70_000, 0, "a")
    # All of PCam with paths for ids, in a file of 7 GB.
    chunk.check_id_array((262_144,), np.dtype("U500"), 262_144, 7 << 30, "a")


@pytest.mark.parametrize("dtype", ["S1000000000", ("u1", (500_000_000,)), "O", "c8", "V4", "M8[s]"])
def test_labels_that_are_no_numbers(dtype):
    with pytest.raises(UserError, match="labels must be numbers"):
        chunk.check_label_array((3,), np.dtype(dtype), 3, "a")


@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (3, 2), (-3, -1), (10**30,)])
def test_labels_of_another_number(shape):
    with pytest.raises(UserError, match="labels for 3 images"):
        chunk.check_label_array(shape, np.dtype("u1"), 3, "a")


def test_a_dtype_of_a_thousand_fields_is_told_in_few_words():
    dtype = np.dtype([(f"field{i}", "u1") for i in range(1000)])
    with pytest.raises(UserError) as caught:
        chunk.check_images((1,) * 30, dtype, "a")
    assert len(str(caught.value)) < 250


def test_rows_with_an_id_of_a_megabyte():
    rows = [(np.zeros((96, 96, 3), np.uint8), 0, name) for name in ("a", "b" * 10**6)]
    with pytest.raises(UserError, match="an id of more than 1024 characters") as caught:
        list(chunk.batched_rows(rows))
    assert len(str(caught.value)) < 200


def test_a_chunk_is_told_when_it_has_been_taken():
    chunks = [chunk.Chunk(np.zeros((n, 1)), np.zeros(n), np.arange(n)) for n in (3, 2)]
    told = []

    def begin(*what):
        told.append(what)
        return told.append

    taken = chunk.counted("valid", chunks, 5, begin)
    next(taken)
    assert told == [("reading valid", 5, "patches")]
    next(taken)
    assert told[1:] == [3]
    assert list(taken) == [] and told[1:] == [3, 2]
