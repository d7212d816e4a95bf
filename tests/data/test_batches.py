"""Compares batches with the rows of their seed and step, in a split that holds row numbers."""

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bef_jax.configs.default import get_config
from bef_jax.data import batches
from bef_jax.data.store import Split
from bef_jax.runtime import sharding
from tests.conftest import environment_of

ROOT = Path(__file__).resolve().parents[2]
N, BATCH = 22, 4  # 5 batches an epoch, 2 patches left over


@pytest.fixture
def split(tmp_path):
    """Returns a memory-mapped split in which each pixel and label is the number of its row."""
    rows = np.arange(N, dtype=np.uint8)
    images = np.broadcast_to(rows[:, None, None, None], (N, 96, 96, 3))
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    return Split("train", mapped, rows, rows.astype(str))


@pytest.fixture
def mesh():
    return sharding.make_mesh()


def order_of(labels, seed, batch_size=BATCH, sampling="shuffled"):
    config = get_config()
    config.seed, config.batch_size, config.data.sampling = seed, batch_size, sampling
    return batches.make_order(config, np.asarray(labels))


def stream_of(split, mesh, placement, seed, start, sizes=(1,) * 9):
    """Yields the batches from step `start` on, gathered on the host or on the devices."""
    rows_of = order_of(split.labels, seed)
    if placement == "host":
        yield from batches.host_batches(split, mesh, rows_of, start)
    placed = batches.place_split(split, mesh)
    for selection in batches.selections(placed, mesh, rows_of, start, sizes):
        for indices in selection.indices:
            yield batches.gather(selection.split, indices, mesh)


def take(iterator, n):
    """Returns the rows of the next n batches, [n, BATCH], whose images and labels must agree."""
    taken = []
    for batch in itertools.islice(iterator, n):
        assert batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int32
        images = np.asarray(batch.images)
        assert images.shape == (BATCH, 96, 96, 3)
        assert (images == np.asarray(batch.labels)[:, None, None, None]).all()
        taken.append(np.asarray(batch.labels))
    iterator.close()
    return np.array(taken)


# ---- which patches ------------------------------------------------------------------------------


def epoch(seed, number, n=N, batch_size=BATCH, sampling="shuffled"):
    steps = range(number * (n // batch_size), (number + 1) * (n // batch_size))
    return np.concatenate([*map(order_of(np.arange(n) % 2, seed, batch_size, sampling), steps)])


@pytest.mark.parametrize(("n", "batch_size"), [(22, 4), (20, 4), (7, 7), (9, 1)])
def test_an_epoch_takes_each_patch_at_most_once(n, batch_size):
    for number in (0, 1, 5):
        taken = epoch(3, number, n, batch_size)
        assert len(taken) == n // batch_size * batch_size
        assert len(set(taken.tolist())) == len(taken)
        assert set(taken.tolist()) <= set(range(n))


def test_an_epoch_is_numpys_permutation_of_seed_and_epoch():
    """Checkpoints of older versions are resumed in this order."""
    order = np.random.default_rng((3, 2)).permutation(22)
    np.testing.assert_array_equal(epoch(3, 2), order[:20])


@pytest.mark.parametrize("sampling", ["shuffled", "balanced"])
def test_epochs_and_seeds_differ(sampling):
    pairs = itertools.product((0, 1, 2), (0, 1, 2))
    orders = [epoch(seed, number, sampling=sampling).tolist() for seed, number in pairs]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("sampling", ["shuffled", "balanced"])
def test_rows_depend_on_nothing_but_seed_and_step(sampling):
    steps = [7, 0, 13, 7, 4, 0, 22]
    labels = np.arange(N) % 7 // 3  # ten, nine and three of a class
    first, again = (order_of(labels, 5, sampling=sampling) for _ in range(2))
    rows = [first(step).tolist() for step in steps]
    assert rows == [again(step).tolist() for step in reversed(steps)][::-1]
    assert rows[0] == rows[3]
    assert rows[0] != rows[1]


def test_patches_left_over_in_one_epoch_come_in_others():
    taken = set(np.concatenate([epoch(0, number) for number in range(6)]).tolist())
    assert taken == set(range(N))


@pytest.mark.parametrize(
    ("counts", "batch_size"),
    [
        ((30, 4), 8),  # the rare class comes again and again
        ((3, 40, 9), 8),  # a batch is no multiple of the classes
        ((5, 0, 7, 2), 6),  # a class without patches
        ((4, 4, 4, 4, 4), 3),  # more classes than a batch has patches
        ((11,), 4),
        ((100, 1), 101),  # one step an epoch
    ],
)
def test_a_balanced_epoch_has_all_classes_equally_often(counts, batch_size):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    rows_of = order_of(labels, 1, batch_size, "balanced")
    present = [label for label, count in enumerate(counts) if count]
    steps = len(labels) // batch_size
    for number in (0, 1, 5):
        parts = [*map(rows_of, range(number * steps, (number + 1) * steps))]
        whole = np.concatenate(parts)
        for rows in [*parts, whole]:
            drawn = [np.sum(labels[rows] == label) for label in present]
            assert sum(drawn) == len(rows)
            assert max(drawn) - min(drawn) <= 1, rows
        # No patch of a class comes twice before all of them came, and so on.
        for label in present:
            times = [np.sum(whole == row) for row in np.flatnonzero(labels == label)]
            assert max(times) - min(times) <= 1, times


def test_a_balanced_epoch_finishes_a_class_before_it_begins_again():
    labels = np.repeat([0, 1], [5, 45])
    rows_of = order_of(labels, 0, 10, "balanced")
    drawn = [[row for row in rows_of(step).tolist() if row < 5] for step in range(5)]
    assert all(sorted(rows) == [0, 1, 2, 3, 4] for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) > 1


def test_a_balanced_batch_is_shuffled():
    """A micro-batch is every other patch, and a group of batch statistics is half of a batch."""
    rows_of = order_of(np.repeat([0, 1], 800), 0, 16, "balanced")
    labels = np.array([rows_of(step) >= 800 for step in range(100)])
    for part in (labels[:, ::2], labels[:, :8]):
        shares = part.mean(1)
        assert 0.45 < shares.mean() < 0.55
        assert len(set(shares)) > 3


def test_chance_decides_which_classes_have_one_patch_more():
    firsts = [order_of([0, 1, 2], seed, 1, "balanced")(0).item() for seed in range(30)]
    assert set(firsts) == {0, 1, 2}


# ---- from the host or the devices ---------------------------------------------------------------


@pytest.mark.parametrize("placement", ["host", "device"])
def test_placements_give_the_same_batches(placement, split, mesh):
    taken = take(stream_of(split, mesh, placement, 1, 0), 8)
    expected = [*map(order_of(split.labels, 1), range(8))]
    np.testing.assert_array_equal(taken, expected)


@pytest.mark.parametrize("placement", ["host", "device"])
def test_resuming_gives_the_tail_of_the_stream(placement, split, mesh):
    whole = take(stream_of(split, mesh, placement, 2, 0), 9)
    tail = take(stream_of(split, mesh, placement, 2, 6), 3)
    np.testing.assert_array_equal(tail, whole[6:])


def test_selections_of_several_steps_hold_the_same_batches(split, mesh):
    sizes = [1, 3, 1, 2, 2]
    single = take(stream_of(split, mesh, "device", 2, 3, [1] * 9), 9)
    grouped = take(stream_of(split, mesh, "device", 2, 3, sizes), 9)
    np.testing.assert_array_equal(grouped, single)
    placed = batches.place_split(split, mesh)
    chosen = batches.selections(placed, mesh, order_of(split.labels, 2), 3, sizes)
    assert [len(selection.indices) for selection in chosen] == sizes


@pytest.mark.parametrize(("placement", "placed"), [("host", False), ("device", True)])
def test_only_auto_asks_whether_a_split_fits(placement, placed, split, monkeypatch):
    monkeypatch.setattr(batches, "fits_devices", lambda asked: asked is split and not placed)
    assert batches.should_place(split, placement) == placed
    assert batches.should_place(split, "auto") == (not placed)


def test_a_split_is_not_placed_on_a_cpu(split):
    if jax.default_backend() != "cpu":
        pytest.skip("the default backend is not the CPU")
    assert not batches.fits_devices(split)


PLENTY, TWICE = 1 << 40, 2 * 594 * 1024  # bytes; TWICE is two times the size of the split


@pytest.mark.parametrize(
    ("backend", "limit", "devices", "fits"),
    [
        ("gpu", PLENTY, 1, True),
        ("gpu", TWICE, 1, True),
        ("gpu", TWICE - 1, 1, False),
        ("tpu", TWICE // 4, 4, True),
        ("tpu", TWICE // 4 - 1, 4, False),
        ("gpu", None, 1, False),  # a backend that does not say how much it has
        ("cpu", PLENTY, 1, False),
    ],
)
def test_auto_leaves_half_of_the_accelerators_memory_free(
    backend, limit, devices, fits, split, monkeypatch
):
    class Device:
        def memory_stats(self):
            return limit and {"bytes_limit": limit}

    assert 2 * split.images.nbytes == TWICE
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert batches.fits_devices(split) == fits


# ---- the thread ---------------------------------------------------------------------------------


def producers():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_reading_error_is_raised_when_its_batch_is_taken():
    def make(step):
        if step == 5:
            raise OSError("the disk is gone")
        return step

    stream = batches._prefetch(make, 3)
    assert [next(stream), next(stream)] == [3, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert wait_for(lambda: not producers())


def test_the_thread_ends_with_its_iterator():
    assert wait_for(lambda: not producers())
    stream = batches._prefetch(lambda step: step, 0)
    assert next(stream) == 0
    assert len(producers()) == 1
    stream.close()
    assert wait_for(lambda: not producers())


def test_the_thread_keeps_a_few_batches_ahead_and_no_more():
    made = []
    stream = batches._prefetch(lambda step: made.append(step) or step, 0)
    assert next(stream) == 0
    assert wait_for(lambda: len(made) == 4)  # one taken, two waiting, one that the thread holds
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]
    assert list(itertools.islice(stream, 3)) == [1, 2, 3]
    stream.close()


# ---- eight devices ------------------------------------------------------------------------------

EIGHT_DEVICES = """
import functools
import itertools
import json
import re
import sys

import jax
import numpy as np

from bef_jax.configs.default import get_config
from bef_jax.data import batches
from bef_jax.data.store import Split
from bef_jax.runtime import sharding

mesh = sharding.make_mesh()
assert mesh.size == 8, mesh
rng = np.random.default_rng(0)
gather = jax.jit(functools.partial(batches.gather_rows, mesh=mesh))
for n in (64, 61, 57, 9):  # only 64 is a multiple of 8
    for rows in (rng.integers(0, 256, (n, 4, 3), dtype=np.uint8), rng.integers(-5, 5, n)):
        rows = rows.astype(np.int32) if rows.ndim == 1 else rows
        placed = batches.place(rows, mesh)
        assert placed.sharding == sharding.by_rows(mesh)
        assert placed.addressable_shards[0].data.shape[0] == -(-n // 8)
        indices = np.concatenate([[0, n - 1], rng.integers(0, n, 14)]).astype(np.int32)
        taken = gather(placed, jax.device_put(indices, sharding.replicated(mesh)))
        np.testing.assert_array_equal(taken, rows[indices])
        assert taken.dtype == rows.dtype
        assert taken.sharding.is_equivalent_to(sharding.by_rows(mesh), rows.ndim)
        assert {shard.data.shape[0] for shard in taken.addressable_shards} == {2}

rows = batches.place(np.zeros((61, 96, 96, 3), np.uint8), mesh)
indices = jax.device_put(np.arange(16, dtype=np.int32), sharding.replicated(mesh))
compiled = gather.lower(rows, indices).compile().as_text()
assert "all-gather" not in compiled, compiled
assert "reduce-scatter" in compiled or "all-reduce" in compiled, compiled
shapes = re.findall(r"u8\\[([\\d,]+)\\]", compiled)
sizes = [np.prod([int(side) for side in shape.split(",")]) for shape in shapes]
assert max(sizes) <= 16 * 96 * 96 * 3, max(sizes)  # at most a batch, never the whole split

rows = np.arange(29, dtype=np.uint8)
images = np.broadcast_to(rows[:, None, None, None], (29, 96, 96, 3))
split = Split("train", images, rows, rows.astype(str))
placed = batches.place_split(split, mesh)
pick = jax.jit(lambda chosen, n: batches.gather(chosen.split, chosen.indices[n], mesh))
config = get_config("batch_size=8,data.sampling=balanced")
rows_of = batches.make_order(config, rows % 3)
chosen = batches.selections(placed, mesh, rows_of, 2, [1, 3, 1])
on_devices = (pick(selection, n) for selection in chosen for n in range(len(selection.indices)))
on_host = batches.host_batches(split, mesh, rows_of, 2)
for stream in (on_host, on_devices):
    for expected, batch in zip(json.loads(sys.argv[1]), itertools.islice(stream, 5), strict=True):
        np.testing.assert_array_equal(batch.labels, expected)
        np.testing.assert_array_equal(np.asarray(batch.images)[:, 5, 7, 1], expected)
        assert batch.images.sharding.is_equivalent_to(sharding.by_rows(mesh), 4)
    stream.close()
print("same as on one device")
"""


@pytest.mark.slow
def test_eight_devices_gather_the_same_batches():
    rows_of = order_of(np.arange(29) % 3, 0, 8, "balanced")
    expected = json.dumps([rows_of(step).tolist() for step in range(2, 7)])
    environment = environment_of(devices=8) | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # optimisations could add collectives
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, expected],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same as on one device"
