"""Compares the rows that are read from a file with NumPy's indexing of the same array."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bef_jax.data.stored import rows
from bef_jax.data.stored.rows import StoredRows, blocks
from bef_jax.errors import RunError

SHAPE = (1100, 4, 4, 3)
OFFSET = 128


@pytest.fixture
def file(tmp_path):
    return tmp_path / "images.npy"


@pytest.fixture
def images(file):
    images = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    np.save(file, images)
    assert file.stat().st_size == OFFSET + images.nbytes
    return images


@pytest.fixture
def stored(images, file):
    return StoredRows(file, OFFSET, SHAPE)


INDICES = (
    *(0, 7, -1, -1100, np.int64(3)),
    *(slice(None), slice(5, 9), slice(9, 5), slice(-3, None), slice(1000, 5000), slice(90, 3, -7)),
    *([5, 6, 7, 2, 2, -1, 1099], np.array([], int), np.array([[1, 2], [2, 9]])),
    np.arange(1100) % 3 == 0,
)


@pytest.mark.parametrize("index", INDICES, ids=range(len(INDICES)))
def test_an_index_gives_what_numpy_gives(index, stored, images):
    expected, found = images[index], stored[index]
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(found, expected)
    found[...] = 0  # a new array, so that the file stays as it is
    np.testing.assert_array_equal(stored[index], expected)


@pytest.mark.parametrize("index", [1100, -1101, [0, 1100]])
def test_a_row_that_is_not_there_is_refused(index, stored):
    with pytest.raises(IndexError):
        stored[index]


def test_it_looks_like_an_array(stored, images):
    for name in ("shape", "dtype", "ndim", "nbytes"):
        assert getattr(stored, name) == getattr(images, name)
    assert len(stored) == len(images)
    np.testing.assert_array_equal(np.asarray(stored), images)
    np.testing.assert_array_equal(np.stack(list(stored)), images)


def test_threads_read_at_once(stored, images):
    orders = [np.random.default_rng(seed).permutation(1100) for seed in range(8)]
    begin = threading.Barrier(8)

    def read(order):
        begin.wait()
        return [stored[part] for part in np.array_split(order, 50)]

    with ThreadPoolExecutor(8) as pool:
        for order, found in zip(orders, pool.map(read, orders), strict=True):
            np.testing.assert_array_equal(np.concatenate(found), images[order])


def test_reads_that_return_less_are_continued(stored, images, monkeypatch):
    preadv = rows.os.preadv
    monkeypatch.setattr(rows.os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:1000]], at))
    np.testing.assert_array_equal(stored[:], images)


def test_without_advice_to_the_kernel_rows_are_the_same(images, file, monkeypatch):
    monkeypatch.delattr(rows.os, "posix_fadvise", raising=False)  # as on macOS
    np.testing.assert_array_equal(StoredRows(file, OFFSET, SHAPE)[[5, 2]], images[[5, 2]])


def test_a_file_that_was_cut_after_opening_is_one_line(stored, images, file):
    with open(file, "r+b") as stream:
        stream.truncate(OFFSET + 10 * 48 + 1)
    np.testing.assert_array_equal(stored[:10], images[:10])
    for index in (10, slice(None), [3, 1000]):
        with pytest.raises(RunError, match=f"^{file}: has become shorter since it was opened"):
            stored[index]


def test_an_error_of_the_disk_is_one_line(stored, file, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rows.os, "preadv", fail)
    with pytest.raises(RunError, match=f"^{file}: cannot be read .Input/output error.$"):
        stored[3]


@pytest.mark.parametrize("kind", ["stored", "array"])
def test_blocks_are_the_rows_in_order(kind, stored, images):
    found = list(blocks(stored if kind == "stored" else images))
    assert [(rows.start, rows.stop) for rows, _ in found] == [(0, 512), (512, 1024), (1024, 1100)]
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), images)


def test_the_next_block_is_read_while_one_is_used(images):
    class Watched:
        def __init__(self):
            self.second = threading.Event()

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            if index.start == 512:
                self.second.set()
            return images[index]

    watched = Watched()
    read = blocks(watched)
    next(read)
    assert watched.second.wait(10)
    read.close()
