"""The least time that a step can take, from a chip's published peaks."""

import dataclasses

from bef_jax.planning.chips import Chip
from bef_jax.planning.compiled_step import Figures

# Assumed, not measured: the host takes 2 to 3 microseconds to launch one kernel of a GPU. It takes
# less where XLA collects kernels in a CUDA graph, and the GPU may still be busy in that time. A TPU
# has no entry, because its whole step is one program.
LAUNCH_US = {"cuda": 2.5}

# Bytes sent per device over bytes of the result, for the best algorithm on n devices.
_LINK_BYTES_PER_RESULT_BYTE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The seconds that each limit alone gives a step; None where a figure is not known.

    Attributes:
        compute: its arithmetic at the chip's peak.
        memory: its bytes of main memory at the chip's bandwidth.
        interconnect: what its collectives send over the links.
        launches: its kernels, at an assumed time for each (`LAUNCH_US`).
    """

    compute: float | None
    memory: float | None
    interconnect: float | None
    launches: float | None


def bounds(figures: Figures, chip: Chip, n: int, network_flops: float) -> Bounds:
    """Returns what limits a step.

    Args:
        n: number of devices.
        network_flops: the network's own arithmetic on one device. It stands in where the compiler
            counts none. The step has more, so this is still a bound.
    """
    flops = network_flops if figures.flops is None else figures.flops
    launch = LAUNCH_US.get(chip.platform)
    return Bounds(
        compute=_ratio(flops, chip.peak_flops),  # of bfloat16: training uses no type with a higher
        memory=_ratio(figures.hbm_traffic, chip.hbm_bandwidth),
        interconnect=_ratio(_bytes_sent(figures.collectives, n), chip.link_bandwidth),
        launches=None if None in (figures.kernels, launch) else figures.kernels * launch / 1e6,
    )


def _ratio(amount: float | None, per_second: float | None) -> float | None:
    return None if None in (amount, per_second) else amount / per_second


def _bytes_sent(collectives: dict | None, n: int) -> float | None:
    """Returns the bytes that a device sends in a step; None if the collectives are not known."""
    if collectives is None:
        return None
    return sum(_LINK_BYTES_PER_RESULT_BYTE[k](n) * v["bytes"] for k, v in collectives.items())


def roofline(limits: Bounds) -> tuple[float | None, str | None]:
    """Returns the least seconds that a step can take, and which peak limits it.

    This assumes that arithmetic, memory and links work all the time, at their published peak and
    all at once (Williams et al. 2009). A real step takes longer, so images/s are an upper bound.
    A GPU's may be shorter where its caches save bytes that `counts.hbm_traffic` has. Launches are
    left out, because their time is assumed, and a CUDA graph hides a part of it.

    Returns:
        Seconds, and compute, memory or interconnect; (None, None) if one of the first two is
        unknown. An unknown interconnect is only left out.
    """
    if None in (limits.compute, limits.memory):
        return None, None
    names = ("compute", "memory", "interconnect")
    times = {name: getattr(limits, name) for name in names}
    bound = max(names, key=lambda name: times[name] or 0)
    return times[bound], bound
