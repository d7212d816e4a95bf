"""Batches as a pure function of (seed, step): a permutation per epoch, then a gather.

Nothing is carried from step to step, so a resumed run needs the step alone, on any number of
devices or hosts. Where the patches live decides who gathers: the devices, inside the step, from a
split that is spread over their memory, or a host thread, two batches ahead.
"""

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from bef_jax.data.store import Split
from bef_jax.runtime import sharding

_SHARE = 0.5  # of the accelerators' memory that a split may take: the step needs the rest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """images [B, 96, 96, 3], uint8; labels [B], int32; rows over devices."""

    images: Array
    labels: Array
    steps: ClassVar[int] = 1  # that it is the input of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Batches that the step is still to gather: rows `indices` [S, B] of a split on the devices."""

    split: Batch
    indices: Array

    @property
    def steps(self) -> int:
        """How many steps it is the input of, S."""
        return len(self.indices)


# Two: around an epoch's end the thread that works ahead is in the next one already. A permutation
# of PCam's train split takes 2 MiB.
@functools.lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n patches in one epoch, [n], int64."""
    # A pair as the seed is hashed: by seed + epoch, seed 1 would begin with seed 0's second epoch.
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(seed: int, step: int, n: int, batch_size: int) -> np.ndarray:
    """Which of n patches step `step` trains on, [batch_size].

    An epoch is n // batch_size steps; what is left over takes part in the next epoch's shuffle.
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


def is_placed(split: Split, placement: str) -> bool:
    """Whether `config.data.placement` puts the split on the devices; auto does so if it fits."""
    return placement == "device" or (placement == "auto" and fits_devices(split))


def fits_devices(split: Split) -> bool:
    """Whether a split takes at most half of the accelerators' memory; never on CPU.

    A CPU's device memory is the host's: a copy would buy nothing over the mapped file.
    """
    # Processes that disagreed would wait for each other for ever: devices are counted over all of
    # them, and the limit of one is taken for that of each.
    stats = jax.local_devices()[0].memory_stats()
    if jax.default_backend() == "cpu" or not stats:
        return False
    return fits_memory(split.images.nbytes, stats["bytes_limit"] * jax.device_count())


def fits_memory(split_bytes: int, memory: float) -> bool:
    """Whether a split of so many bytes leaves the step enough of all devices' `memory`, bytes."""
    return split_bytes <= _SHARE * memory


def put_batch(split: Split, mesh: Mesh, indices: np.ndarray) -> Batch:
    """Gathers rows on the host; each host reads only those of its own devices."""

    def put(rows: np.ndarray, dtype: type) -> Array:
        shape = (len(indices), *rows.shape[1:])
        # index[0] is the slice of the batch that a device of this process holds; of a mapped file
        # only its pages are read.
        return jax.make_array_from_callback(
            shape,
            sharding.by_rows(mesh),
            lambda index: rows[indices[index[0]]].astype(dtype, copy=False),
        )

    return Batch(put(split.images, np.uint8), put(split.labels, np.int32))


def _prefetch(make: Callable[[int], Batch], start: int) -> Iterator[Batch]:
    """Yields make(start), make(start + 1), ...; a thread makes two ahead."""
    # Bounded, or the thread would fill the memory with batches that nobody has asked for yet.
    ready: queue.Queue = queue.Queue(maxsize=2)
    stop = threading.Event()

    def work() -> None:
        step = start
        while not stop.is_set():
            try:
                item = make(step)
            except Exception as error:  # shown where the batch is asked for
                item = error
            _put_unless(stop, ready, item)
            step += 1

    # A daemon, since it may be waiting for a disk when the process wants to end.
    threading.Thread(target=work, daemon=True, name="batches").start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    # Also where the loop ends or fails: closing the generator comes here.
    finally:
        stop.set()


def _put_unless(stop: threading.Event, ready: queue.Queue, item) -> None:
    """Waits for room, but not for ever: nobody empties the queue of a loop that has ended."""
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue


# ---- on the devices -----------------------------------------------------------------------------


def place_split(split: Split, mesh: Mesh) -> Batch:
    """A whole split on the devices, a consecutive part on each."""
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
    """Yields the input of as many steps as each of `sizes` says, from step `start` on."""
    step = start
    for size in sizes:
        # All that the host sends, 4 bytes per patch: images stay where they are.
        steps = range(step, step + size)
        indices = [batch_indices(seed, at, len(split), batch_size) for at in steps]
        # int32: JAX has no int64 unless told, and no split has 2^31 patches.
        yield Selection(placed, sharding.put_everywhere(np.array(indices, np.int32), mesh))
        step += size


def gather(split: Batch, indices: Array, mesh: Mesh) -> Batch:
    """The batch of rows `indices` [B] of a split from `place_split`."""
    return jax.tree.map(functools.partial(gather_rows, indices=indices, mesh=mesh), split)


def place(rows: np.ndarray, mesh: Mesh) -> Array:
    """Spreads rows over the devices, a consecutive part each; the last is padded with zeros."""
    # Devices need equal parts. No index names what is padded.
    total = -(-len(rows) // mesh.size) * mesh.size

    def part(index) -> np.ndarray:
        # A slice past the end is cut short by NumPy: what is missing is what to pad.
        held = rows[index[0]]
        first, last, _ = index[0].indices(total)
        missing = last - first - len(held)
        return np.pad(held, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else held

    return jax.make_array_from_callback((total, *rows.shape[1:]), sharding.by_rows(mesh), part)


def gather_rows(rows: Array, indices: Array, mesh: Mesh) -> Array:
    """rows[indices], spread over the devices by rows as well.

    Each device picks what it holds of the batch and leaves zeros elsewhere; their sum, scattered,
    is the batch. So a batch crosses the wires once, and the split never does.

    Args:
        rows: [n, ...] from `place`, on the devices.
        indices: [B] on every device; B a multiple of the devices' number.
    """
    # One device has all rows: nothing to mask or to add up.
    if mesh.size == 1:
        return jnp.take(rows, indices, axis=0)

    def pick(held: Array, indices: Array) -> Array:
        # [B], this device's own row numbers; those that others hold fall outside.
        local = indices - lax.axis_index(sharding.AXIS) * len(held)
        mine = (local >= 0) & (local < len(held))
        # [B, ...] on every device: a global batch of uint8, much less than the step's activations.
        picked = held[jnp.where(mine, local, 0)]
        picked = jnp.where(mine.reshape(-1, *[1] * (held.ndim - 1)), picked, 0)
        # In uint8: each row has one addend that is not 0, so nothing overflows, and a quarter of
        # float32 crosses.
        return lax.psum_scatter(picked, sharding.AXIS, scatter_dimension=0, tiled=True)

    by_rows, everywhere = PartitionSpec(sharding.AXIS), PartitionSpec()
    return jax.shard_map(pick, mesh=mesh, in_specs=(by_rows, everywhere), out_specs=by_rows)(
        rows, indices
    )
