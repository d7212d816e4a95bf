"""Batches as a pure function of (seed, step): a permutation per epoch, then a gather.

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

from bef_jax.data.store import Split
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


# Keep two: near the end of an epoch the thread that works ahead is already in the next one, while
# StepLog may still have to name the patches of a batch of this one. A permutation of PCam's train
# split takes 2 MiB.
@functools.lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order of n patches in one epoch, [n], int64."""
    # NumPy hashes the pair. With seed + epoch, seed 1 would begin with the second epoch of seed 0.
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(seed: int, step: int, n: int, batch_size: int) -> np.ndarray:
    """Returns the indices of the patches, out of n, that step `step` trains on, [batch_size].

    An epoch has n // batch_size steps. The patches left over wait for the next epoch's shuffle.
    """
    epoch, index = divmod(step, n // batch_size)
    start = index * batch_size
    return epoch_permutation(seed, epoch, n)[start : start + batch_size]


def host_batches(
    split: Split, mesh: Mesh, seed: int, batch_size: int, start: int
) -> Iterator[Batch]:
    """Yields the batches of steps start, start + 1, ... without end."""

    def make(step: int) -> Batch:
        return put_batch(split, mesh, batch_indices(seed, step, len(split), batch_size))

    return _prefetch(make, start)


def should_place(split: Split, placement: str) -> bool:
    """Returns whether `config.data.placement` puts the split on the devices; auto: if it fits."""
    return placement == "device" or (placement == "auto" and fits_devices(split))


def fits_devices(split: Split) -> bool:
    """Returns whether a split takes at most half of the accelerators' memory; on CPU always False.

    A CPU's device memory is the host's, so a copy would gain nothing over the mapped file.
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

    def put(rows: np.ndarray, dtype: type) -> Array:
        shape = (len(indices), *rows.shape[1:])
        # index[0] is the slice of the batch that a device of this process holds. If the file is
        # mapped, only the pages of these rows are read.
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
    """Places a whole split on the devices, a consecutive part on each."""
    return Batch(place(split.images, mesh), place(split.labels.astype(np.int32), mesh))


def selections(
    split: Split,
    placed: Batch,
    mesh: Mesh,
    seed: int,
    batch_size: int,
    start: int,
    sizes: Iterable[int],
) -> Iterator[Selection]:
    """Yields one selection for each of `sizes`, with that many steps, from step `start` on."""
    step = start
    for size in sizes:
        # The host sends only these indices, 4 bytes per patch; the images stay where they are.
        steps = range(step, step + size)
        indices = [batch_indices(seed, at, len(split), batch_size) for at in steps]
        # int32 is enough: JAX has no int64 by default, and no split has 2^31 patches.
        yield Selection(placed, sharding.put_everywhere(np.array(indices, np.int32), mesh))
        step += size


def gather(split: Batch, indices: Array, mesh: Mesh) -> Batch:
    """Returns the batch of rows `indices` [B] of a split from `place_split`."""
    return jax.tree.map(functools.partial(gather_rows, indices=indices, mesh=mesh), split)


def place(rows: np.ndarray, mesh: Mesh) -> Array:
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
