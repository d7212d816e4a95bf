"""The least time that a step can take, from a chip's published peaks."""

from bef_jax.planning.chips import Chip
from bef_jax.planning.compiled_step import Figures

# Bytes sent per device over bytes of the result, for the best algorithm on n devices.
_LINK_BYTES_PER_RESULT_BYTE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def roofline(figures: Figures, chip: Chip, n: int) -> tuple[float | None, str | None]:
    """Returns the least seconds that a step can take, and which peak limits it.

    This assumes that arithmetic, memory and links work all the time, at their published peak and
    all at once (Williams et al. 2009). A real step takes longer, so images/s are an upper bound.

    Args:
        n: number of devices.

    Returns:
        Seconds, and compute, memory or interconnect; (None, None) if a figure is unknown.
        An unknown link_bandwidth only leaves interconnect out.
    """
    peak = chip.peak_flops  # that of bfloat16: no type that training uses has a higher one
    if None in (peak, figures.flops, figures.hbm_traffic, figures.collectives):
        return None, None
    times = {"compute": figures.flops / peak, "memory": figures.hbm_traffic / chip.hbm_bandwidth}
    if figures.collectives and chip.link_bandwidth:
        sent = sum(
            _LINK_BYTES_PER_RESULT_BYTE[kind](n) * sums["bytes"]
            for kind, sums in figures.collectives.items()
        )
        times["interconnect"] = sent / chip.link_bandwidth
    bound = max(times, key=times.get)
    return times[bound], bound
