"""--mode=plan: compiles the training step for hardware that this machine does not need to have.

The step is the one that training compiles. The plan compares what the compiler reports (memory,
arithmetic, bytes moved, collectives) with the chip's published peaks. What a compiler does not
report is None.
"""

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from bef_jax.config import check_devices
from bef_jax.data.batches import Batch, fits_memory
from bef_jax.data.patch import PATCH
from bef_jax.errors import UserError
from bef_jax.models.ops.mbconv.grid import LANES
from bef_jax.planning import hlo, topology
from bef_jax.planning.chips import Chip
from bef_jax.planning.flops import training_flops
from bef_jax.planning.topology import Topology
from bef_jax.runtime import sharding
from bef_jax.runtime.compiled import bytes_accessed, flops, memory_bytes
from bef_jax.training.optim import placeholder_schedule
from bef_jax.training.state import abstract_state
from bef_jax.training.step import compile_step

LOG = logging.getLogger(__name__)

PCAM_TRAIN = 262_144  # patches; assumed if config.data.train_size is not set
BATCH_UNIT = 8  # step between batch sizes per device: 8 rows fill a TPU's vector register
ATTEMPTS = 3  # compilations that the search for the largest batch may take

# Bytes that cross a device's links per byte of a collective's result, at best: in a ring of n.
_WIRE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}

# XLA times kernels on the GPU to choose among them. Without a GPU, it would use default tiles of
# Triton for products, which fail for some shapes. So use cuBLAS, whose kernels take every shape.
_OPTIONS = {"cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}}


@dataclasses.dataclass(frozen=True)
class Figures:
    """A compiler's figures for one device's part of a step; None where it reports none.

    Attributes:
        flops: floating-point operations, with those of the augmentation and the optimiser.
        bytes_accessed: bytes that operations read and write, in on-chip memory and in main memory.
        hbm_traffic: bytes that move between main memory and the chip (`hlo.hbm_bytes`).
        hbm_bytes: bytes of memory that the step needs.
        collectives: as `hlo.collectives` counts them.
        seconds: time to compile.
        refused: whether the compiler stopped because the step needs more memory than there is.
    """

    flops: float | None
    bytes_accessed: float | None
    hbm_traffic: float | None
    hbm_bytes: int | None
    collectives: dict[str, dict[str, int]] | None
    seconds: float
    refused: bool = False


def plan_training(config: ConfigDict, name: str | None, largest: bool = True) -> dict:
    """Plans the training of `config` on the topology `name`, such as v5e:2x4.

    Args:
        config: the whole configuration.
        name: the name of a topology (`topology.parse`).
        largest: whether to look for the largest batch, by up to ATTEMPTS more compilations.

    Returns:
        The summary; its keys are stable.

    Raises:
        UserError: the topology is unknown or can't share the batch, or its compiler is missing.
    """
    if not name:
        raise UserError("--topology is missing: write one like --topology=v5e:2x4")
    # Do this before anything asks JAX for devices, because a plan uses only the CPU.
    place = topology.parse(name)
    mesh = topology.make_mesh(place)
    check_devices(config, mesh)
    LOG.info("compiling %s for %d x %s", config.model.name, mesh.size, place.chip.kind)
    figures = measure(config, mesh, place.chip)
    summary = summarise(config, mesh, place, figures)
    if largest:
        summary["largest_batch_per_device"] = _largest(config, mesh, place.chip, figures)
    _print_table(summary)
    return summary


def summarise(config: ConfigDict, mesh: Mesh, place: Topology, figures: Figures) -> dict:
    """Returns the summary of a plan, without the largest batch, which stays None."""
    chip, state = place.chip, abstract_state(config)
    # None means unknown: a compiler that reports no memory does not say that the step fits.
    fits = _known(figures.hbm_bytes, chip.hbm_bytes) and figures.hbm_bytes <= chip.hbm_bytes
    fits = False if figures.refused else fits
    seconds, bound = roofline(figures, chip, mesh.size)
    images = config.batch_size // mesh.size
    return {
        "mode": "plan",
        "topology": place.name,
        "device_kind": chip.kind,
        "n_devices": mesh.size,
        "model": config.model.name,
        "dtype": config.dtype,
        "bn_groups": config.bn_groups,
        "placement": "host" if placed_split(config, mesh, chip) is None else "device",
        "batch_size": config.batch_size,
        "batch_per_device": images,
        "flops_per_device": figures.flops,
        "flops_per_image": _known(figures.flops) and figures.flops / images,
        # Only the network's arithmetic: the compiled figures have augmentation and optimiser too.
        "model_flops_per_image": training_flops(config),
        "bytes_accessed_per_device": figures.bytes_accessed,
        "hbm_traffic_per_device": figures.hbm_traffic,
        "hbm_bytes_per_device": figures.hbm_bytes,
        "hbm_capacity_bytes": _known(chip.hbm_bytes) and int(chip.hbm_bytes),
        "fits": fits,
        "largest_batch_per_device": None,
        "parameter_bytes": count_bytes(state.params),
        "state_bytes": count_bytes(state),
        "collectives": figures.collectives,
        "roofline_step_ms": _known(seconds) and 1e3 * seconds,
        "roofline_images_per_second": _known(seconds) and config.batch_size / seconds,
        "bound_by": bound,
        "compile_seconds": figures.seconds,
    }


def _known(*values) -> bool | None:
    """Returns True, or None if a value is None, so that `_known(x) and f(x)` is None if x is."""
    return None if None in values else True


def count_bytes(tree) -> int:
    """Returns the bytes of all arrays of a tree, or of leaves that have their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---- compiling ----------------------------------------------------------------------------------


def measure(config: ConfigDict, mesh: Mesh, chip: Chip) -> Figures:
    """Compiles the step for `mesh`, and returns what the compiler reports of it."""
    schedule = placeholder_schedule(config)
    state = sharding.with_sharding(abstract_state(config), sharding.replicated(mesh))
    placed = placed_split(config, mesh, chip)
    start = time.perf_counter()
    try:
        options = _OPTIONS.get(chip.platform)
        compiled = compile_step(config, schedule, mesh, state, placed, options=options)
    except jax.errors.JaxRuntimeError as error:
        # libtpu refuses what does not fit, which answers the plan; other errors are failures.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        return Figures(None, None, None, bytes_wanted(str(error)), None, seconds, refused=True)
    seconds = time.perf_counter() - start
    memory = memory_bytes(compiled)
    LOG.info("compiled in %.0f s; memory per device: %s", seconds, _shown(memory, "GB", 1e9))
    # Accumulation is a loop. XLA counts one turn of it, so its figures are not those of a step.
    whole = config.optim.accumulate == 1
    accessed, text = bytes_accessed(compiled) if whole else None, compiled.as_text()
    return Figures(
        flops=flops(compiled) if whole else None,
        bytes_accessed=accessed,
        # XLA's count is lower if an operation reads a part of an array, as a gather does.
        hbm_traffic=_known(accessed) and min(accessed, hlo.hbm_bytes(text)),
        hbm_bytes=memory,
        collectives=hlo.collectives(text),
        seconds=seconds,
    )


def placed_split(config: ConfigDict, mesh: Mesh, chip: Chip) -> Batch | None:
    """Returns the shapes of the training split on the devices, if training would place it there.

    The split has config.data.train_size patches, or as many as PCam's.
    """
    # Do not open a store, because the data need not be on this machine.
    patches = config.data.train_size or PCAM_TRAIN
    # `batches.place` pads the split in the same way.
    images = (sharding.round_up(patches, mesh.size), PATCH, PATCH, 3)
    memory = chip.hbm_bytes and chip.hbm_bytes * mesh.size
    auto = memory is not None and fits_memory(math.prod(images), memory)
    if not {"host": False, "device": True, "auto": auto}[config.data.placement]:
        return None
    rows = sharding.by_rows(mesh)
    return Batch(
        jax.ShapeDtypeStruct(images, jnp.uint8, sharding=rows),
        jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=rows),
    )


def bytes_wanted(message: str) -> int | None:
    """Returns the bytes that a refused program would use, from "Used 17.36G of 15.75G hbm"."""
    # Only the text of libtpu's error has this. Its K, M, G are powers of 1024.
    match = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    return round(float(match[1]) * 2 ** (10 * (1 + "KMGT".index(match[2])))) if match else None


# ---- the roofline and the largest batch ---------------------------------------------------------


def roofline(figures: Figures, chip: Chip, n: int) -> tuple[float | None, str | None]:
    """Returns the least seconds that a step can take, and which peak limits it.

    This assumes that arithmetic, memory and links work all the time, at their published peak and
    all at once (Williams et al. 2009). A real step takes longer, so images/s are an upper bound.

    Args:
        n: number of devices.

    Returns:
        Seconds, and compute, memory or interconnect; (None, None) if a figure is unknown.
    """
    peak = chip.peak_flops  # that of bfloat16: no floating-point type has a higher one
    if _known(peak, figures.flops, figures.hbm_traffic, figures.collectives) is None:
        return None, None
    times = {"compute": figures.flops / peak, "memory": figures.hbm_traffic / chip.hbm_bandwidth}
    if figures.collectives and chip.link_bandwidth:
        sent = sum(_WIRE[kind](n) * sums["bytes"] for kind, sums in figures.collectives.items())
        times["interconnect"] = sent / chip.link_bandwidth
    bound = max(times, key=times.get)
    return times[bound], bound


def _largest(config: ConfigDict, mesh: Mesh, chip: Chip, figures: Figures) -> int | None:
    """Returns the largest batch per device that fits, among those that the configuration allows."""
    if chip.hbm_bytes is None:
        return None
    # Each micro-batch is split over the devices and over the groups of batch normalisation.
    group = LANES if config.model.mbconv == "pallas" else 1
    rows = config.optim.accumulate * math.lcm(group * config.bn_groups, mesh.size)
    unit = math.lcm(rows // mesh.size, BATCH_UNIT)

    def memory(batch: int) -> int | None:
        # Change a copy, because the caller's configuration must keep its batch size.
        larger = config.copy_and_resolve_references()
        larger.batch_size = batch * mesh.size
        LOG.info("does a batch of %d per device fit?", batch)
        return measure(larger, mesh, chip).hbm_bytes

    known = {config.batch_size // mesh.size: figures.hbm_bytes}
    return largest_batch(memory, known, chip.hbm_bytes, unit)


def largest_batch(
    memory: Callable[[int], int | None], known: dict[int, int | None], capacity: float, unit: int
) -> int | None:
    """Returns the largest batch that fits `capacity`: a multiple of `unit`, or the known batch.

    Memory grows almost linearly with the batch. Two measurements give a line, and a third one
    checks what the line predicts. If that does not fit, it replaces the farther of the two.

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
        # The line predicts a batch that was measured already, so there is nothing more to learn.
        if candidate in known:
            break
        known[candidate] = memory(candidate)
        candidate = _foretold(known, capacity)
    fitting = [batch for batch, size in known.items() if _fits(size, capacity)]
    return max(fitting, default=None)


def _round_down(batch: int, unit: int) -> int:
    return batch // unit * unit


def _fits(size: int | None, capacity: float) -> bool:
    return size is not None and size <= capacity


def _foretold(known: dict[int, int | None], capacity: float) -> int:
    """Predicts the batch that just fits, by a line through the two sizes nearest to `capacity`."""
    sized = {batch: size for batch, size in known.items() if size is not None}
    # A refusal that names no size gives no point for a line.
    if len(sized) < 2:
        return min(known) // 2
    (b0, m0), (b1, m1) = sorted(sized.items(), key=lambda item: abs(item[1] - capacity))[:2]
    # Round down. A flat line predicts nothing, so double the batch instead.
    return int(b0 + (capacity - m0) * (b1 - b0) / (m1 - m0)) if m1 != m0 else 2 * max(b0, b1)


# ---- the table for people -----------------------------------------------------------------------


def _print_table(summary: dict) -> None:
    """Writes the plan to stderr, for people."""
    title = f"{summary['model']} on {summary['topology']}: {summary['n_devices']} devices"
    table = Table("", "", title=title, show_header=False)
    for row in _rows(summary):
        table.add_row(*row)
    Console(stderr=True).print(table)


def _rows(summary: dict) -> list[tuple[str, str]]:
    fits = {True: "yes", False: "no", None: "not known"}[summary["fits"]]
    needed = _shown(summary["hbm_bytes_per_device"], "GB", 1e9)
    return [
        ("images per device and step", _shown(summary["batch_per_device"])),
        ("memory per device", f"{needed} of {_shown(summary['hbm_capacity_bytes'], 'GB', 1e9)}"),
        ("fits", fits),
        ("largest batch per device", _shown(summary["largest_batch_per_device"])),
        ("arithmetic per image, as compiled", _shown(summary["flops_per_image"], "GFLOP", 1e9)),
        ("network arithmetic per image", _shown(summary["model_flops_per_image"], "GFLOP", 1e9)),
        ("memory traffic per device", _shown(summary["hbm_traffic_per_device"], "GB", 1e9)),
        ("parameters", _shown(summary["parameter_bytes"], "MB", 1e6)),
        *_collective_rows(summary["collectives"]),
        ("time of a step, at least", _shown(summary["roofline_step_ms"], "ms", 1)),
        ("images/s, upper bound", _shown(summary["roofline_images_per_second"])),
        ("bound by", summary["bound_by"] or "not known"),
    ]


def _collective_rows(collectives: dict | None) -> list[tuple[str, str]]:
    if collectives is None:
        return [("collectives", _shown(None))]
    return [
        (kind, f"{sums['count']} calls, {_shown(sums['bytes'], 'MB in total', 1e6)}")
        for kind, sums in collectives.items()
    ]


def _shown(value: float | None, unit: str = "", scale: float | None = None) -> str:
    """Formats a whole number, or with a scale a number with two decimals and its unit."""
    if value is None:
        return "not reported"
    return f"{value / scale:,.2f} {unit}" if scale else f"{value:,.0f}"
