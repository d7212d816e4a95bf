"""The largest batch that fits a device's memory, found in a few compilations."""

import logging
import math
from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.models.ops.mbconv.grid import LANES
from bef_jax.planning.chips import Chip
from bef_jax.planning.compiled_step import Figures, measure

LOG = logging.getLogger(__name__)

BATCH_UNIT = 8  # step between batch sizes per device: 8 rows fill a TPU's vector register
ATTEMPTS = 3  # compilations that the search may take


def find(config: ConfigDict, mesh: Mesh, chip: Chip, figures: Figures) -> int | None:
    """Returns the largest batch per device that fits, among those that the configuration allows."""
    if chip.hbm_bytes is None:
        return None
    # Each micro-batch is split over the devices and over the groups of batch normalisation. The
    # Pallas kernels also need a multiple of LANES images in each group.
    lanes = LANES if config.model.mbconv == "pallas" else 1
    divisor = config.optim.accumulate * math.lcm(lanes * config.bn_groups, mesh.size)
    unit = math.lcm(divisor // mesh.size, BATCH_UNIT)

    def memory(batch: int) -> float | None:
        # Change a copy, because the caller's configuration must keep its batch size.
        larger = config.copy_and_resolve_references()
        larger.batch_size = batch * mesh.size
        LOG.info("does a batch of %d per device fit?", batch)
        return _bytes_needed(measure(larger, mesh, chip), chip.hbm_bytes)

    known = {config.batch_size // mesh.size: _bytes_needed(figures, chip.hbm_bytes)}
    return search(memory, known, chip.hbm_bytes, unit)


def _bytes_needed(figures: Figures, capacity: float) -> float | None:
    """Returns the bytes that a step needs: more than `capacity` if its compiler refused it."""
    # A compiler has less than the chip's whole memory, such as 31 of v4's 32 GiB. So it can refuse
    # a step that wants less than `capacity`.
    if not figures.refused or figures.hbm_bytes is None:
        return figures.hbm_bytes
    return max(figures.hbm_bytes, capacity + 1)


def search(
    memory: Callable[[int], float | None],
    known: dict[int, float | None],
    capacity: float,
    unit: int,
) -> int | None:
    """Returns the largest batch that fits `capacity`: a multiple of `unit`, or the known batch.

    Memory grows almost linearly with the batch. Two measurements give a line, which predicts the
    batch to measure next. From then on, the line goes through the two nearest to `capacity`.

    Args:
        memory: returns the bytes that a batch per device needs; None if it does not fit and the
            compiler gives no size.
        known: {batch: bytes} of the one batch that was measured already.
        capacity: bytes.

    Returns:
        A batch that was measured to fit; None if none was found.
    """
    known = dict(known)
    (batch,) = known
    # Double or halve the batch, because two points far apart give a better line. A compilation
    # takes minutes, so a guess too close would waste one.
    candidate = 2 * _round_down(batch, unit) if _fits(known[batch], capacity) else batch // 2
    for _ in range(ATTEMPTS):
        candidate = max(_round_down(candidate, unit), unit)
        # Measuring a batch again would show nothing new.
        if candidate in known:
            break
        known[candidate] = memory(candidate)
        candidate = _predicted_batch(known, capacity)
    fitting = [batch for batch, size in known.items() if _fits(size, capacity)]
    return max(fitting, default=None)


def _round_down(batch: int, unit: int) -> int:
    return batch // unit * unit


def _fits(size: float | None, capacity: float) -> bool:
    return size is not None and size <= capacity


def _predicted_batch(known: dict[int, float | None], capacity: float) -> int:
    """Predicts the batch that just fits, by a line through the two sizes nearest to `capacity`."""
    sized = {batch: size for batch, size in known.items() if size is not None}
    # A refusal that names no size gives no point for a line, so measure a smaller batch.
    if len(sized) < 2:
        return min(known) // 2
    (b0, m0), (b1, m1) = sorted(sized.items(), key=lambda item: abs(item[1] - capacity))[:2]
    # Round down. A flat line predicts nothing, so double the batch instead.
    return int(b0 + (capacity - m0) * (b1 - b0) / (m1 - m0)) if m1 != m0 else 2 * max(b0, b1)
