"""Tests what is checked before an array is read; test_sources.py tests what arrays hold."""

import numpy as np
import pytest

from bef_jax.data import chunk
from bef_jax.errors import UserError


def test_memory_of_ids_is_limited_by_the_size_of_the_patches():
    wide = np.dtype("U1000")
    chunk.check_id_array((60_000,), wide, 60_000, 0, "a")
    with pytest.raises(UserError, match="a: 70000 ids of 1000 characters; write shorter ids"):
        chunk.check_id_array((70_000,), wide, 70_000, 0, "a")
    # Ids of bytes become text, which takes four bytes per character.
    with pytest.raises(UserError, match="write shorter ids"):
        chunk.check_id_array((70_000,), np.dtype("S1000"), 70_000, 0, "a")
    # A file of 7 GiB may hold all of PCam with paths as ids.
    chunk.check_id_array((262_144,), np.dtype("U500"), 262_144, 7 << 30, "a")


@pytest.mark.parametrize(
    "dtype", ["S1000000000", ("u1", (500_000_000,)), "O", "c8", "V4", "M8[s]"], ids=str
)
def test_labels_that_are_not_numbers_are_refused(dtype):
    with pytest.raises(UserError, match="labels must be numbers"):
        chunk.check_label_array((3,), np.dtype(dtype), 3, "a")


@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (3, 2), (-3, -1), (10**30,)], ids=str)
def test_labels_that_do_not_match_the_images_are_refused(shape):
    with pytest.raises(UserError) as caught:
        chunk.check_label_array(shape, np.dtype("u1"), 3, "a")
    assert str(caught.value) == (
        f"a: labels are uint8 {list(shape)} for 3 images; each image needs exactly one label"
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "fix"),
    [
        ((3, 96, 96, 3), "f4", "convert them to uint8 first"),
        ((3, 64, 64, 3), "u1", "set --config.data.patch_size=64, or cut or resample .* RGB first"),
        ((3, 64, 64, 3), "f4", "set --config.data.patch_size=64, or cut or resample .* RGB first"),
        ((3, 64, 96, 3), "u1", r"\[3, 64, 96, 3\]; cut or resample them to 96x96 RGB first"),
        ((3, 16, 16, 3), "u1", r"\[3, 16, 16, 3\]; cut or resample them to 96x96 RGB first"),
    ],
)
def test_the_fix_for_images_is_about_what_is_wrong(shape, dtype, fix):
    with pytest.raises(UserError, match=rf"^a: images must be uint8 .*{fix}$"):
        chunk.check_images(shape, np.dtype(dtype), "a")


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_labels_have_the_smallest_type_that_holds_all_classes(classes, dtype):
    names = tuple(map(str, range(classes)))
    labels = chunk.check_labels(np.array([0.0, classes - 1]), 2, "a", names)
    assert labels.dtype == dtype and labels.tolist() == [0, classes - 1]
    with pytest.raises(UserError, match=f"label {classes} in row 1"):
        chunk.check_labels(np.array([0, classes]), 2, "a", names)


def test_the_error_for_a_dtype_of_a_thousand_fields_is_short():
    dtype = np.dtype([(f"field{i}", "u1") for i in range(1000)])
    with pytest.raises(UserError) as caught:
        chunk.check_images((1,) * 30, dtype, "a")
    assert len(str(caught.value)) < 250


def test_an_id_of_a_megabyte_is_refused():
    rows = [(np.zeros((96, 96, 3), np.uint8), 0, name) for name in ("a", "b" * 10**6)]
    with pytest.raises(UserError, match=r"^file: b+ is an id of more than 1024 char") as caught:
        list(chunk.batched_rows(rows, "file"))
    assert len(str(caught.value)) < 200


def test_progress_counts_a_chunk_when_the_next_one_is_taken():
    chunks = [chunk.Chunk(np.zeros((n, 1)), np.zeros(n), np.arange(n)) for n in (3, 2)]
    progress = []

    def begin(*what):
        progress.append(what)
        return progress.append

    taken = chunk.counted("valid", chunks, 5, begin)
    next(taken)
    assert progress == [("reading valid", 5, "patches")]
    next(taken)
    assert progress[1:] == [3]
    assert list(taken) == [] and progress[1:] == [3, 2]
