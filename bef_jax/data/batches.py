"""Batches as a pure function of (seed, step): an order of patches per epoch, then a gather.

Nothing is carried from step to step, so a resumed run needs only the step, on any number of devices
or hosts. A split may be spread over the memory of the devices; then they gather inside the step.
Otherwise a host thread gathers ahead of the devices.
"""

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from bef_jax.data.store import Split
from bef_jax.data.stored.rows import StoredRows
from bef_jax.runtime import sharding

# A split may take this share of the memory of the accelerators: the step needs the rest.
_MAX_MEMORY_SHARE = 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Images and labels, with rows spread over devices: a batch, or a whole placed split.

    Attributes:
        images: [B, S, S, 3], uint8.
        labels: [B], int32.
    """

    images: Array
    labels: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The batches of S steps, not gathered yet: rows `indices` [S, B] of a split on the devices."""

    split: Batch
    indices: Array


def make_order(config: ConfigDict, labels: np.ndarray) -> Callable[[int], np.ndarray]:
    """Returns `rows_of(step)`: the rows of the patches that a step trains on, [batch_size], int64.

    An epoch has len(labels) // batch_size steps. With data.sampling=shuffled it is a part of a
    permutation; the patches left over wait for the next epoch. With balanced, see `_balanced`.

    Args:
        config: the whole configuration; seed, batch_size and data.sampling are read.
        labels: of the training split, [n], integers.
    """
    batch_size = config.batch_size
    steps = len(labels) // batch_size
    draw = {"shuffled": _shuffled, "balanced": _balanced}[config.data.sampling]

    # One epoch is enough, because a caller asks for the steps in turn. PCam's order takes 2 MiB.
    @functools.lru_cache(maxsize=1)
    def epoch_rows(epoch: int) -> np.ndarray:
        # NumPy hashes the pair. With seed + epoch, seed 1 would begin with epoch 1 of seed 0.
        return draw(np.random.default_rng((config.seed, epoch)), labels, steps, batch_size)

    def rows_of(step: int) -> np.ndarray:
        epoch, index = divmod(step, steps)
        return epoch_rows(epoch)[index]

    return rows_of


def _shuffled(
    rng: np.random.Generator, labels: np.ndarray, steps: int, batch_size: int
) -> np.ndarray:
    """Returns the first rows of a permutation, [steps, batch_size]."""
    return rng.permutation(len(labels))[: steps * batch_size].reshape(steps, batch_size)


def _balanced(
    rng: np.random.Generator, labels: np.ndarray, steps: int, batch_size: int
) -> np.ndarray:
    """Draws each class that has patches equally often, and returns rows, [steps, batch_size].

    How often two classes come differs by at most 1, in each batch and in the epoch. A class begins
    again, in a new order, when all its patches have come.
    """
    _, counts = np.unique(labels, return_counts=True)
    rows_by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    # Take the classes in turn, so that a batch, which is any piece of it, has all equally often.
    # Where a batch is no multiple of the classes, chance decides which of them have one more.
    rows = np.empty(steps * batch_size, np.int64)
    for place, number in enumerate(rng.permutation(len(counts))):
        turns = rows[place :: len(counts)]
        rounds = np.tile(rows_by_class[number], (-(-len(turns) // counts[number]), 1))
        turns[:] = rng.permuted(rounds, axis=1).ravel()[: len(turns)]
    # Shuffle each batch. A part of a batch, such as a micro-batch or a group of batch statistics,
    # could otherwise be of one class.
    return rng.permuted(rows.reshape(steps, batch_size), axis=1)


def host_batches(
    split: Split, mesh: Mesh, rows_of: Callable[[int], np.ndarray], start: int
) -> Iterator[Batch]:
    """Yields the batches of steps start, start + 1, ... without end; `make_order` says of what."""

    def make(step: int) -> Batch:
        return put_batch(split, mesh, rows_of(step))

    return _prefetch(make, start)


def should_place(split: Split, placement: str) -> bool:
    """Returns whether `config.data.placement` puts the split on the devices; auto: if it fits."""
    return placement == "device" or (placement == "auto" and fits_devices(split))


def fits_devices(split: Split) -> bool:
    """Returns whether a split takes at most half of the accelerators' memory; on CPU always False.

    A CPU's device memory is the host's, so a copy would gain nothing over the file in memory.
    """
    # All processes must get the same answer, or they would wait for each other without end. So the
    # devices of all processes count, and each is taken to have the limit of the first one here.
    stats = jax.local_devices()[0].memory_stats()
    if jax.default_backend() == "cpu" or not stats:
        return False
    return fits_memory(split.images.nbytes, stats["bytes_limit"] * jax.device_count())


def fits_memory(split_bytes: int, memory: float) -> bool:
    """Returns whether a split leaves enough of `memory`, the bytes of all devices, for the step."""
    return split_bytes <= _MAX_MEMORY_SHARE * memory


def put_batch(split: Split, mesh: Mesh, indices: np.ndarray) -> Batch:
    """Gathers rows on the host; each host reads only those of its own devices."""

    def put(rows: np.ndarray | StoredRows, dtype: type) -> Array:
        shape = (len(indices), *rows.shape[1:])
        # index[0] is the slice of the batch that a device of this process holds.
        return jax.make_array_from_callback(
            shape,
            sharding.by_rows(mesh),
            lambda index: rows[indices[index[0]]].astype(dtype, copy=False),
        )

    return Batch(put(split.images, np.uint8), put(split.labels, np.int32))


def _prefetch(make: Callable[[int], Batch], start: int) -> Iterator[Batch]:
    """Yields make(start), make(start + 1), ...; a thread works ahead."""
    # Two batches wait, and the thread may hold a third. Without a limit it would fill the memory.
    ready: queue.Queue = queue.Queue(maxsize=2)
    stop = threading.Event()

    def work() -> None:
        step = start
        while not stop.is_set():
            try:
                item = make(step)
            except Exception as error:  # raised again where the batch is taken
                item = error
            _put_unless(stop, ready, item)
            step += 1

    # A daemon thread, because it may be waiting for a disk when the process wants to end.
    threading.Thread(target=work, daemon=True, name="batches").start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    # This also runs when the generator is closed, or when nothing refers to it any more.
    finally:
        stop.set()


def _put_unless(stop: threading.Event, ready: queue.Queue, item) -> None:
    """Puts `item` into the queue once it has room; gives up when `stop` is set.

    It must not wait without end, because nobody empties the queue of a loop that has ended.
    """
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue


# ---- on the devices -----------------------------------------------------------------------------


def place_split(split: Split, mesh: Mesh) -> Batch:
    """Places a whole split on the devices, a consecutive part on each.

    The host holds what its devices get until they have it: 6.75 GiB of PCam on one device.
    """
    return Batch(place(split.images, mesh), place(split.labels.astype(np.int32), mesh))


def selections(
    placed: Batch,
    mesh: Mesh,
    rows_of: Callable[[int], np.ndarray],
    start: int,
    sizes: Iterable[int],
) -> Iterator[Selection]:
    """Yields one selection for each of `sizes`, with that many steps, from step `start` on.

    Args:
        rows_of: from `make_order`.
    """
    step = start
    for size in sizes:
        # The host sends only these indices, 4 bytes per patch; the images stay where they are.
        indices = [rows_of(at) for at in range(step, step + size)]
        # int32 is enough: JAX has no int64 by default, and no split has 2^31 patches.
        yield Selection(placed, sharding.put_everywhere(np.array(indices, np.int32), mesh))
        step += size


def gather(split: Batch, indices: Array, mesh: Mesh) -> Batch:
    """Returns the batch of rows `indices` [B] of a split from `place_split`."""
    return jax.tree.map(functools.partial(gather_rows, indices=indices, mesh=mesh), split)


def place(rows: np.ndarray | StoredRows, mesh: Mesh) -> Array:
    """Spreads rows over the devices in consecutive equal parts, with zeros at the end."""
    # Devices need equal parts. No index points to the padding.
    total = sharding.round_up(len(rows), mesh.size)

    def part(index) -> np.ndarray:
        # NumPy shortens a slice that goes past the end, so the missing rows are the padding.
        held = rows[index[0]]
        first, last, _ = index[0].indices(total)
        missing = last - first - len(held)
        return np.pad(held, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else held

    return jax.make_array_from_callback((total, *rows.shape[1:]), sharding.by_rows(mesh), part)


def gather_rows(rows: Array, indices: Array, mesh: Mesh) -> Array:
    """Returns rows[indices], also spread over the devices by rows.

    Each device picks the rows of the batch that it holds and leaves zeros elsewhere. The sum over
    the devices is the batch, and each device gets its own rows of the sum. So each device
    sends at most the bytes of one batch, and the split is never sent.

    Args:
        rows: [n, ...] from `place`, on the devices.
        indices: [B] on every device; B is a multiple of the number of devices.
    """
    # One device has all rows, so there is nothing to mask or to add up.
    if mesh.size == 1:
        return jnp.take(rows, indices, axis=0)

    def pick(held: Array, indices: Array) -> Array:
        # [B]: row numbers within this device's part. Rows of other devices fall outside of it.
        local = indices - lax.axis_index(sharding.AXIS) * len(held)
        mine = (local >= 0) & (local < len(held))
        # [B, ...] on every device: a global batch of uint8 is much less than the activations.
        picked = held[jnp.where(mine, local, 0)]
        picked = jnp.where(mine.reshape(-1, *[1] * (held.ndim - 1)), picked, 0)
        # Sum in the dtype of the rows. Only one addend of each row is not 0, so uint8 does not
        # overflow, and float32 would send four times as many bytes.
        return lax.psum_scatter(picked, sharding.AXIS, scatter_dimension=0, tiled=True)

    by_rows, everywhere = PartitionSpec(sharding.AXIS), PartitionSpec()
    return jax.shard_map(pick, mesh=mesh, in_specs=(by_rows, everywhere), out_specs=by_rows)(
        rows, indices
    )
