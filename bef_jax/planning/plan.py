"""--mode=plan: compiles the training step for hardware that this machine does not need to have.

The step is the one that training compiles. The plan compares what the compiler reports (memory,
arithmetic, collectives) and what its program's text shows (bytes moved, kernels) with the chip's
published peaks. What is not known is None.
"""

import logging

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from bef_jax.config import check_devices
from bef_jax.errors import UserError
from bef_jax.planning import largest_batch, topology
from bef_jax.planning.chips import Chip
from bef_jax.planning.compiled_step import Figures, format_figure, measure, placed_split
from bef_jax.planning.flops import training_flops
from bef_jax.planning.roofline import LAUNCH_US, bounds, roofline
from bef_jax.planning.topology import Topology
from bef_jax.training.state import abstract_state

LOG = logging.getLogger(__name__)


def plan_training(config: ConfigDict, name: str | None, find_largest: bool = True) -> dict:
    """Plans the training of `config` on the topology `name`, such as v5e:2x4.

    Args:
        config: the whole configuration.
        name: the name of a topology (`topology.parse`).
        find_largest: whether to look for the largest batch, by up to `largest_batch.ATTEMPTS` more
            compilations.

    Returns:
        The summary; its keys are stable.

    Raises:
        UserError: the topology is unknown or can't share the batch, or its compiler is missing.
    """
    if not name:
        raise UserError("--topology is missing: write one like --topology=v5e:2x4")
    target = topology.parse(name)
    # Do this before anything asks JAX for devices, because a plan uses only the CPU.
    mesh = topology.make_mesh(target)
    check_devices(config, mesh)
    LOG.info("compiling %s for %d x %s", config.model.name, mesh.size, target.chip.kind)
    figures = measure(config, mesh, target.chip)
    largest = largest_batch.find(config, mesh, target.chip, figures) if find_largest else None
    summary = summarise(config, mesh, target, figures, largest)
    _print_table(summary)
    return summary


def summarise(
    config: ConfigDict, mesh: Mesh, target: Topology, figures: Figures, largest: int | None
) -> dict:
    """Returns the summary of a plan; `largest` is the largest batch per device, if it is known."""
    chip, state = target.chip, abstract_state(config)
    images, network_flops = config.batch_size // mesh.size, training_flops(config)
    limits = bounds(figures, chip, mesh.size, images * network_flops)
    seconds, bound = roofline(limits)
    return {
        "mode": "plan",
        "topology": target.name,
        "device_kind": chip.kind,
        "n_devices": mesh.size,
        "model": config.model.name,
        "dtype": config.dtype,
        "bn_groups": config.bn_groups,
        "placement": "host" if placed_split(config, mesh, chip) is None else "device",
        "batch_size": config.batch_size,
        "batch_per_device": images,
        "flops_per_device": figures.flops,
        "flops_per_image": None if figures.flops is None else figures.flops / images,
        # Only the network's arithmetic: the compiled figures have augmentation and optimiser too.
        "model_flops_per_image": network_flops,
        "bytes_accessed_per_device": figures.bytes_accessed,
        "hbm_traffic_per_device": figures.hbm_traffic,
        "kernels": figures.kernels,
        "hbm_bytes_per_device": figures.hbm_bytes,
        "hbm_capacity_bytes": None if chip.hbm_bytes is None else int(chip.hbm_bytes),
        "fits": _fits(figures, chip),
        "largest_batch_per_device": largest,
        "parameter_bytes": count_bytes(state.params),
        "state_bytes": count_bytes(state),
        "collectives": figures.collectives,
        "bytes_bound_ms": _milliseconds(limits.memory),
        "flops_bound_ms": _milliseconds(limits.compute),
        "launch_bound_ms": _milliseconds(limits.launches),
        "launch_us_assumed": LAUNCH_US.get(chip.platform),
        "roofline_step_ms": _milliseconds(seconds),
        "roofline_images_per_second": None if seconds is None else config.batch_size / seconds,
        "bound_by": bound,
        "compile_seconds": figures.seconds,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _fits(figures: Figures, chip: Chip) -> bool | None:
    """Returns whether the step fits the chip's memory; None if one of the two is not known."""
    if figures.refused:
        return False
    if None in (figures.hbm_bytes, chip.hbm_bytes):
        return None
    return figures.hbm_bytes <= chip.hbm_bytes


def count_bytes(tree) -> int:
    """Returns the bytes of all leaves of a tree, of arrays or ShapeDtypeStructs."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---- the table for people -----------------------------------------------------------------------


def _print_table(summary: dict) -> None:
    """Writes the plan to stderr, for people."""
    title = f"{summary['model']} on {summary['topology']}: {summary['n_devices']} devices"
    table = Table("", "", title=title, show_header=False)
    for row in _rows(summary):
        table.add_row(*row)
    Console(stderr=True).print(table)


def _rows(summary: dict) -> list[tuple[str, str]]:
    def figure(key: str, unit: str = "", scale: float | None = None) -> str:
        return format_figure(summary[key], unit, scale)

    needed = figure("hbm_bytes_per_device", "GB", 1e9)
    capacity = figure("hbm_capacity_bytes", "GB", 1e9)
    launch = summary["launch_us_assumed"]
    assumed = "" if launch is None else f", {launch:.1f} us assumed for each"
    return [
        ("images per device and step", figure("batch_per_device")),
        ("memory per device", f"{needed} of {capacity}"),
        ("fits", {True: "yes", False: "no", None: "not known"}[summary["fits"]]),
        ("largest batch per device", figure("largest_batch_per_device")),
        ("arithmetic per image, as compiled", figure("flops_per_image", "GFLOP", 1e9)),
        ("network arithmetic per image", figure("model_flops_per_image", "GFLOP", 1e9)),
        ("memory traffic per device", figure("hbm_traffic_per_device", "GB", 1e9)),
        ("kernels per step", figure("kernels")),
        ("parameters", figure("parameter_bytes", "MB", 1e6)),
        *_collective_rows(summary["collectives"]),
        ("time of memory traffic", figure("bytes_bound_ms", "ms", 1)),
        ("time of arithmetic", figure("flops_bound_ms", "ms", 1)),
        (f"time of launches{assumed}", figure("launch_bound_ms", "ms", 1)),
        ("time of a step, at least", figure("roofline_step_ms", "ms", 1)),
        ("images/s, upper bound", figure("roofline_images_per_second")),
        ("bound by", summary["bound_by"] or "not known"),
    ]


def _collective_rows(collectives: dict | None) -> list[tuple[str, str]]:
    if collectives is None:
        return [("collectives", format_figure(None))]
    return [
        (kind, f"{sums['count']} calls, {format_figure(sums['bytes'], 'MB in total', 1e6)}")
        for kind, sums in collectives.items()
    ]
