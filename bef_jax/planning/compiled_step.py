"""What a compiler reports of the training step, for hardware that need not be there."""

import dataclasses
import logging
import math
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.data.batches import Batch, fits_memory
from bef_jax.planning import counts, hlo
from bef_jax.planning.chips import Chip
from bef_jax.runtime import sharding
from bef_jax.runtime.compiled import bytes_accessed, flops, memory_bytes
from bef_jax.training.packing import make_packing
from bef_jax.training.state import abstract_state
from bef_jax.training.step import compile_step

LOG = logging.getLogger(__name__)

PCAM_TRAIN = 262_144  # patches; assumed if config.data.train_size is not set

# XLA times kernels on the GPU to choose among them. Without a GPU, it would use default tiles of
# Triton for products, which fail for some shapes. So use cuBLAS, whose kernels take every shape.
_COMPILER_OPTIONS = {"cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """A compiler's figures for one device's part of a step; None where it reports none.

    Attributes:
        flops: floating-point operations, with those of the augmentation and the optimiser.
        bytes_accessed: bytes that operations read and write, in on-chip memory and in main memory.
        hbm_traffic: bytes that move between main memory and the chip (`counts.hbm_traffic`).
        kernels: launches on a GPU (`counts.kernels`); None for others.
        hbm_bytes: bytes of memory that the step needs.
        collectives: as `counts.collectives` counts them.
        seconds: time to compile.
        refused: whether the compiler stopped because the step needs more memory than there is.
    """

    flops: float | None = None
    bytes_accessed: float | None = None
    hbm_traffic: float | None = None
    kernels: int | None = None
    hbm_bytes: int | None = None
    collectives: dict[str, dict[str, int]] | None = None
    seconds: float
    refused: bool = False


def measure(config: ConfigDict, mesh: Mesh, chip: Chip) -> Figures:
    """Compiles the step for `mesh`, and returns what the compiler reports of it."""
    state = make_packing(config, mesh).shapes(abstract_state(config))
    placed = placed_split(config, mesh, chip)
    start = time.perf_counter()
    try:
        options = _COMPILER_OPTIONS.get(chip.platform)
        compiled = compile_step(config, mesh, state, placed, options=options)
    except jax.errors.JaxRuntimeError as error:
        # libtpu refuses what does not fit, which is a result for the plan. Others are failures.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        return Figures(hbm_bytes=bytes_wanted(str(error)), seconds=seconds, refused=True)
    seconds = time.perf_counter() - start
    figures = _reported(compiled, config, chip, seconds)
    memory = format_figure(figures.hbm_bytes, "GB", 1e9)
    LOG.info("compiled in %.0f s; memory per device: %s", seconds, memory)
    return figures


def _reported(
    compiled: jax.stages.Compiled, config: ConfigDict, chip: Chip, seconds: float
) -> Figures:
    program = hlo.read(compiled.as_text())
    # Accumulation is a loop. XLA counts one turn of it, so its figures are not those of a step. Our
    # own counts have all turns, if the text says how many there are.
    whole, known = config.optim.accumulate == 1, counts.turns_known(program)
    accessed = bytes_accessed(compiled) if whole else None
    traffic = counts.hbm_traffic(program) if known else None
    if accessed is not None:
        # A TPU's text does not say how often the loop over the crops of a batch turns. So one turn
        # counts, as in XLA's count. That may be lower than ours, because it knows more operations
        # that read a part of an array.
        traffic = min(accessed, counts.hbm_traffic(program))
    return Figures(
        flops=flops(compiled) if whole else None,
        bytes_accessed=accessed,
        hbm_traffic=traffic,
        kernels=counts.kernels(program) if known and chip.platform == "cuda" else None,
        hbm_bytes=memory_bytes(compiled),
        collectives=counts.collectives(program),
        seconds=seconds,
    )


def placed_split(config: ConfigDict, mesh: Mesh, chip: Chip) -> Batch | None:
    """Returns the shapes of the training split on the devices, if training would place it there.

    The split has config.data.train_size patches, or as many as PCam's.
    """
    # Do not open a store, because the data need not be on this machine.
    patches, side = config.data.train_size or PCAM_TRAIN, config.data.patch_size
    # `batches.place` pads the split in the same way.
    images = (sharding.round_up(patches, mesh.size), side, side, 3)
    capacity = chip.hbm_bytes
    auto = capacity is not None and fits_memory(math.prod(images), capacity * mesh.size)
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


def format_figure(value: float | None, unit: str = "", scale: float | None = None) -> str:
    """Formats a whole number, or with a scale a number with two decimals and its unit."""
    if value is None:
        return "not reported"
    return f"{value / scale:,.2f} {unit}" if scale else f"{value:,.0f}"
