"""Prints how many bytes a training step of EfficientNet-B3 moves on a TPU v5e; only compiles it.

    pip install -e .[plan]
    python results/tpu_bytes.py plain | none | block | pallas [--total_stride=32]

`none` and `block` are values of `config.model.remat`, `pallas` is one of `config.model.mbconv`.
`plain` is what one would write first: batch normalisation, its activation and every convolution
have the gradients that JAX derives. XLA does not estimate the cycles of kernels: `tpu_kernels.py`
counts those.
"""

import argparse
import re

import jax.numpy as jnp
from jax import Array, lax
from ml_collections import ConfigDict

from bef_jax.configs.default import get_config
from bef_jax.models import layers
from bef_jax.models.ops import norm
from bef_jax.models.ops.depthwise import Padding
from bef_jax.planning import counts, hlo, topology
from bef_jax.runtime import sharding
from bef_jax.runtime.compiled import bytes_accessed, flops, memory_bytes
from bef_jax.training.state import abstract_state
from bef_jax.training.step import compile_step

IMAGES = 256  # per chip


def main() -> None:
    """Compiles one version and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", choices=("plain", "none", "block", "pallas"))
    parser.add_argument("--total_stride", type=int, default=32)
    options = parser.parse_args()
    version = options.version
    if version == "plain":
        make_plain()
    mesh = topology.make_mesh(topology.parse("v5e:2x2"))
    config = make_config(mesh.size, version, options.total_stride)
    state = sharding.with_sharding(abstract_state(config), sharding.replicated(mesh))
    step = compile_step(config, mesh, state)
    text = step.as_text()
    cycles = estimated_cycles(text)
    depthwise_cycles = estimated_cycles(text, "/depthwise_conv/")
    print(f"{version}, per image: {bytes_accessed(step) / IMAGES / 1e6:.1f} MB by XLA's count")
    print(f"to and from main memory: {counts.hbm_traffic(hlo.read(text)) / IMAGES / 1e6:.1f} MB")
    print(f"arithmetic: {flops(step) / IMAGES / 1e9:.2f} GFLOP")
    print(f"memory per chip: {memory_bytes(step) / 1e9:.2f} GB")
    print(f"XLA's estimate of a step: {cycles / 1e6:.1f} M cycles")
    print(f"share of depthwise convolutions: {depthwise_cycles / cycles:.0%}")


def estimated_cycles(text: str, name: str = "") -> int:
    """Returns the sum of XLA's estimates for the operations that have `name` in their lines."""
    lines = (line for line in text.splitlines() if name in line)
    return sum(int(n) for line in lines for n in re.findall(r'"estimated_cycles":"(\d+)"', line))


def make_config(devices: int, version: str, total_stride: int) -> ConfigDict:
    """Returns the configuration of B3 without boosts, as in timm."""
    config = get_config()
    config.dtype, config.bn_groups, config.batch_size = "bfloat16", devices, devices * IMAGES
    config.rcc.enabled = False
    config.model.update(
        name="efficientnet_b3", total_stride=total_stride, attention="none", fusion=False
    )
    config.model.remat = "block" if version == "block" else "none"
    config.model.mbconv = "pallas" if version == "pallas" else "layers"
    return config


def make_plain() -> None:
    """Replaces the network's own layers with the plain ones below."""
    layers.batch_norm, layers.pointwise_batch_norm = batch_norm, pointwise_batch_norm
    layers.pointwise, layers.depthwise_conv = pointwise, depthwise_conv


def batch_norm(
    x: Array, scale: Array, bias: Array, groups: int, epsilon: float, activation: str = "none"
) -> tuple[Array, Array, Array]:
    """Normalises with statistics from one pass, as `norm.batch_norm` does."""
    parts = x.astype(jnp.float32).reshape(groups, -1, *x.shape[1:])
    axes = tuple(range(1, x.ndim))
    mean = jnp.mean(parts, axes, keepdims=True)
    var = jnp.mean(parts * parts, axes, keepdims=True) - mean * mean
    y = (parts - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
    y = norm.ACTIVATIONS[activation](y.astype(x.dtype)).reshape(x.shape)
    mean, var = (lax.stop_gradient(statistic.reshape(groups, -1)) for statistic in (mean, var))
    return y, mean, var


def pointwise_batch_norm(x: Array, kernel: Array, *rest) -> tuple[Array, Array, Array]:
    """Computes the product first, then normalises it."""
    return batch_norm(pointwise(x, kernel), *rest)


def pointwise(x: Array, kernel: Array | None) -> Array:
    """Returns a 1 x 1 convolution of x; without a kernel, x itself."""
    if kernel is None:
        return x
    return convolution(x, kernel[None, None], 1, "VALID")


def depthwise_conv(x: Array, kernel: Array, stride: int, padding: Padding, form: str) -> Array:
    """Returns a depthwise convolution of x, with the gradient that JAX derives."""
    return convolution(x, kernel, stride, padding, groups=x.shape[-1])


def convolution(
    x: Array, kernel: Array, stride: int, padding: Padding | str, groups: int = 1
) -> Array:
    """Returns XLA's convolution of x [N, H, W, C]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


if __name__ == "__main__":
    main()
