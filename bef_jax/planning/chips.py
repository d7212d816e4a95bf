"""Chips, with the figures that their makers publish: arithmetic, memory and links."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of one device; None where a figure is not published, or not needed.

    Attributes:
        name: what a topology calls it; None if nothing can be compiled for it.
        platform: cpu | tpu | cuda.
        kinds: JAX's names for it, first the one that JAX gives to the devices of a topology.
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bytes: its memory. What a driver leaves to programs is a few percent more or less.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s that it sends to the rest of its slice or node, over all links.
    """

    name: str | None
    platform: str
    kinds: tuple[str, ...]
    peak_flops: float | None = None
    hbm_bytes: float | None = None
    hbm_bandwidth: float | None = None
    link_bandwidth: float | None = None

    @property
    def kind(self) -> str:
        """JAX's name for it in a topology."""
        return self.kinds[0]


# TPU: the page of each version in the Cloud TPU documentation. The links of v4, six of 50 GB/s, are
# from Jouppi et al. 2023 (arXiv 2304.01433), table 4. GPU: NVIDIA's data sheets of H100, H200, A100
# and L4. Their FLOP/s with sparsity are twice those here. They add both directions of NVLink and of
# L4's PCIe, so half of that is here.
CHIPS = (
    Chip("v4", "tpu", ("TPU v4",), 275e12, 32 * 2**30, 1200e9, 300e9),
    Chip("v5e", "tpu", ("TPU v5 lite",), 197e12, 16e9, 819e9, 200e9),
    Chip("v5p", "tpu", ("TPU v5", "TPU v5p"), 459e12, 95e9, 2765e9, 600e9),
    Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 32e9, 1638e9, 400e9),
    Chip(None, "cuda", ("NVIDIA H200",), 989e12),
    Chip("h100", "cuda", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3350e9, 450e9),
    Chip(None, "cuda", ("NVIDIA H100 PCIe",), 756e12),
    Chip("a100", "cuda", ("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, 2039e9, 300e9),
    Chip(None, "cuda", ("NVIDIA A100 80GB PCIe",), 312e12),
    Chip(None, "cuda", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12),
    Chip("l4", "cuda", ("NVIDIA L4",), 121e12, 24e9, 300e9, 32e9),
    Chip("cpu", "cpu", ("cpu",)),
)


def by_name(name: str) -> Chip | None:
    """Returns the chip that topologies call `name`; None if there is none."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of a device; None if it is not published, or not listed here."""
    # Only peaks of bfloat16 are listed. A TPU makes a float32 product from several bfloat16 ones,
    # and no peak for it is published.
    if dtype != "bfloat16":
        return None
    return next((chip.peak_flops for chip in CHIPS if device_kind in chip.kinds), None)
