"""Chips, with the figures that their makers publish: arithmetic, memory and links."""

import dataclasses

# Dense bfloat16 FLOP/s of one device, by JAX's name for it. Google publishes them in the Cloud TPU
# documentation, on the pages of TPU v4, v5e, v5p and v6e. NVIDIA publishes them in the data sheets
# of H100, H200, A100 and L4, where figures with sparsity are twice these.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    # JAX has two names for one chip: for v5p here, and for v6e below.
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of a device; None if it is not published, or not listed here."""
    # A TPU makes a float32 product from several bfloat16 ones, and no peak for it is published.
    return PEAK_FLOPS.get(device_kind) if dtype == "bfloat16" else None


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of one device, except its arithmetic, which `peak_flops` has.

    Attributes:
        platform: cpu | tpu | cuda.
        kind: JAX's name for it.
        hbm_bytes: its memory. What a driver leaves to programs is a few percent more or less.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s that it sends to the rest of its slice or node, over all links.
    """

    platform: str
    kind: str
    hbm_bytes: float | None = None
    hbm_bandwidth: float | None = None
    link_bandwidth: float | None = None


# TPU: the page of each version in the Cloud TPU documentation. The links of v4, six of 50 GB/s, are
# from Jouppi et al. 2023 (arXiv 2304.01433), table 4. GPU: NVIDIA's data sheets of H100 SXM, A100
# SXM 80GB and L4. They add both directions of NVLink and of L4's PCIe, so half of that is here.
CHIPS = {
    "v4": Chip("tpu", "TPU v4", 32 * 2**30, 1200e9, 300e9),
    "v5e": Chip("tpu", "TPU v5 lite", 16e9, 819e9, 200e9),
    "v5p": Chip("tpu", "TPU v5", 95e9, 2765e9, 600e9),
    "v6e": Chip("tpu", "TPU v6 lite", 32e9, 1638e9, 400e9),
    "a100": Chip("cuda", "NVIDIA A100-SXM4-80GB", 80e9, 2039e9, 300e9),
    "h100": Chip("cuda", "NVIDIA H100 80GB HBM3", 80e9, 3350e9, 450e9),
    "l4": Chip("cuda", "NVIDIA L4", 24e9, 300e9, 32e9),
    "cpu": Chip("cpu", "cpu"),
}
