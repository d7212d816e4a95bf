"""Chips, with what their makers publish of them: arithmetic, memory and links."""

import dataclasses

# Dense bfloat16 FLOP/s of one device, by JAX's name for it, as the makers publish them: Google in
# the pages on TPU v4, v5e, v5p and v6e of the Cloud TPU documentation; NVIDIA in the data sheets
# of H100, H200, A100 and L4, whose figures with sparsity are twice these.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    # JAX knows one chip by two names: v5p here, v6e below.
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
    """FLOP/s that a device reaches at best; None where that is not published, or not here."""
    # A TPU puts float32 products together from several of bfloat16, and no peak is published.
    return PEAK_FLOPS.get(device_kind) if dtype == "bfloat16" else None


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as its maker publishes it; `peak_flops` has its arithmetic.

    Attributes:
        platform: cpu | tpu | cuda.
        kind: JAX's name for it.
        hbm_bytes: capacity of its memory. A driver leaves a few percent more or less to programs.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s that it sends to the others of its slice or node, over all links.
    """

    platform: str
    kind: str
    hbm_bytes: float | None = None
    hbm_bandwidth: float | None = None
    link_bandwidth: float | None = None


# TPU: the pages on each version of the Cloud TPU documentation, and for the links of v4 Jouppi et
# al. 2023 (arXiv 2304.01433), table 4: six of 50 GB/s. GPU: NVIDIA's data sheets of H100 SXM, A100
# SXM 80GB and L4; of NVLink, whose figures there are for both ways together, and of L4's PCIe half.
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
