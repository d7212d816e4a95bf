"""Compiles the kernels for their chips, because the simulation does not know these limits."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bef_jax.models.layers import padding_of
from bef_jax.models.ops.mbconv.block import KernelPlan, mbconv
from bef_jax.models.ops.mbconv.grid import Window, strips
from bef_jax.planning import topology
from tests.models.ops.mbconv.test_block import make_params


@pytest.mark.compilers
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("side", "kernel", "stride", "channels", "dtype", "activation"),
    [
        # B3's first block, in strips, and its last one.
        (48, 3, 1, (40, 40, 24), "bfloat16", "silu"),
        (3, 3, 1, (384, 2304, 384), "bfloat16", "silu"),
        (48, 3, 2, (24, 144, 32), "float32", "silu"),
        (12, 5, 2, (40, 240, 80), "bfloat16", "relu6"),  # Lite0
        (12, 3, 1, (352, 2112, 352), "bfloat16", "silu"),  # B2, total stride 8; nearly too large
        (12, 3, 1, (640, 3840, 640), "float32", "silu"),  # B7
    ],
)
def test_kernels_compile(chip, side, kernel, stride, channels, dtype, activation):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it compiles for hardware that is not here")
    devices = topology.make_mesh(topology.parse(chip)).devices[:1]
    here = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())
    size = (side, side)
    window = Window(size, kernel, stride, padding_of(kernel, stride, size, "same"))
    cut = strips(window, *channels, itemsize=jnp.dtype(dtype).itemsize)
    block = KernelPlan(cut, 1, 1e-3, activation)

    def loss(x, params):
        return mbconv(x, params, block)[0].sum()

    x = jax.ShapeDtypeStruct((256, *size, channels[0]), dtype, sharding=here)
    params = jax.eval_shape(lambda: make_params(channels, kernel))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=here), params)
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, params).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 4 * len(cut)
