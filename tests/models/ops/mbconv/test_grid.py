import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from bef_jax.errors import UserError
from bef_jax.models import REGISTRY, boosted
from bef_jax.models.layers import padding_of
from bef_jax.models.ops.mbconv import grid
from bef_jax.models.ops.mbconv.block import KernelPlan, mbconv
from bef_jax.models.ops.mbconv.grid import LANES, Window, strips, tile_channels
from tests.models.ops.mbconv.test_block import make_params

CASES = [(3, 1, (4, 5)), (3, 2, (6, 5)), (5, 1, (5, 4)), (5, 2, (7, 6)), (3, 2, (1, 2))]
conventions = pytest.mark.parametrize("convention", ["same", "symmetric"])


def make_window(kernel, stride, size, convention):
    return Window(size, kernel, stride, padding_of(kernel, stride, size, convention))


@conventions
@pytest.mark.parametrize(("kernel", "stride", "size"), CASES)
def test_phases_hold_what_every_tap_reads(kernel, stride, size, convention):
    window = make_window(kernel, stride, size, convention)
    x = np.arange(1, 1 + math.prod(size)).reshape(size)
    padded = np.pad(x, [(before, after + 2 * stride) for before, after in window.padding])
    phases, (top, left) = np.zeros(window.phases, int), (pad[0] for pad in window.padding)
    for h, w in np.ndindex(size):
        (a, p), (b, q) = divmod(h + top, stride), divmod(w + left, stride)
        phases[a, p, b, q] = x[h, w]
    for row, column in np.ndindex(window.outputs):
        for i, j in window.taps:
            found = phases[row + i // stride, i % stride, column + j // stride, j % stride]
            assert found == padded[row * stride + i, column * stride + j]


@conventions
@pytest.mark.parametrize(("kernel", "stride", "size"), CASES)
def test_inside_is_every_input_once(kernel, stride, size, convention):
    window = make_window(kernel, stride, size, convention)
    for axis in (0, 1):
        before = window.padding[axis][0]
        found = [
            stride * a + phase - before
            for phase in range(stride)
            for a in range(*window.inside(axis, phase))
        ]
        assert sorted(found) == list(range(size[axis]))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "channels", "fits"),
    [
        ((24, 48), 3, 1, (40, 40, 24), True),  # half of the maps of B3's first block
        ((24, 24), 3, 1, (32, 192, 32), True),
        ((3, 3), 3, 1, (384, 2304, 384), True),  # B3's last block
        ((6, 6), 5, 1, (112, 672, 112), True),
        ((48, 48), 3, 1, (40, 40, 24), False),  # the whole maps of B3's first block
        ((6, 6), 3, 1, (10, 60, 10), False),  # no multiple of 8 divides 60
    ],
)
def test_a_block_divides_the_channels_or_there_is_none(size, kernel, stride, channels, fits):
    window = make_window(kernel, stride, size, "same")
    block = tile_channels(window, *channels, itemsize=2)
    assert (block > 0) == fits
    assert block % 8 == 0
    assert not fits or channels[1] % block == 0


def test_what_no_strip_holds_is_refused():
    fix = r"maps of \(6, 6\) with 60 channels: set config\.model\.mbconv=layers$"
    with pytest.raises(UserError, match=fix):
        strips(make_window(3, 1, (6, 6), "same"), 10, 60, 10, 2)


@conventions
@pytest.mark.parametrize(("kernel", "stride", "size"), CASES)
def test_strips_read_what_their_outputs_are_made_of(kernel, stride, size, convention, monkeypatch):
    # The test pretends that only two rows of the output fit on the chip.
    monkeypatch.setattr(grid, "tile_channels", lambda part, *_: 8 * (part.outputs[0] <= 2))
    window = make_window(kernel, stride, size, convention)
    cut = strips(window, 1, 8, 1, 4)
    assert len(cut) == -(-window.outputs[0] // 2)
    x = np.random.default_rng(0).normal(size=size)
    expected = correlate(x, window)
    parts = [correlate(x[slice(*strip.inputs)], strip.window) for strip in cut]
    assert [strip.outputs for strip in cut] == list(
        itertools.pairwise([0, *np.cumsum([len(part) for part in parts])])
    )
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def correlate(x, window):
    """Returns a depthwise convolution with the taps 1, 2, 3, ..."""
    padded, (rows, columns), k = np.pad(x, window.padding), window.outputs, window.kernel
    taps, s = np.arange(1, k * k + 1).reshape(k, k), window.stride
    return np.array(
        [
            [(padded[r * s : r * s + k, c * s : c * s + k] * taps).sum() for c in range(columns)]
            for r in range(rows)
        ]
    )


def blocks_of(name, total_stride):
    """Returns (side, input channels, stage of one block) of each shape, for 96 x 96 images."""
    architecture = REGISTRY[name].args[0]
    stem, stages = boosted.reduce_downsampling(2, architecture.stages, total_stride)
    side, inputs, found = 96 // stem, architecture.stem, {}
    for stage in stages:
        for stride in (stage.stride, *(1,) * (stage.repeats - 1)):
            found[side, inputs, dataclasses.replace(stage, repeats=1, stride=stride)] = None
            side, inputs = -(-side // stride), stage.channels
    return list(found)


def bytes_of(shape, dtype):
    """Returns the bytes of an array on a TPU, which keeps it in tiles of 8 x 128."""
    *rest, rows, lanes = (length or 1 for length in shape)
    tiles = math.prod(rest) * -(-rows // 8) * -(-lanes // LANES)
    return tiles * 8 * LANES * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("total_stride", [32, 8])
@pytest.mark.parametrize("name", ["efficientnet_b2", "efficientnet_b7", "efficientnet_test"])
def test_what_the_kernels_ask_for_fits_on_the_chip(name, total_stride, dtype, monkeypatch):
    """Counts the buffers of each call; arrays that are loaded or written by block have two.

    It also checks that XLA is told of every byte that a kernel reads or writes, because XLA has no
    other account of them.
    """
    asked = []

    def pallas_call(_, *, in_specs, out_specs, scratch_shapes, out_shape, cost_estimate, **__):
        def call(*arrays):
            moved = [array for array in (*arrays, *out_shape) if array is not None]
            elements = (math.prod(array.shape) * array.dtype.itemsize for array in moved)
            assert cost_estimate.bytes_accessed == sum(elements)
            total = sum(bytes_of(m.shape, m.dtype) for m in scratch_shapes if m is not None)
            for spec, array in zip((*in_specs, *out_specs), (*arrays, *out_shape), strict=True):
                if spec is not None:
                    buffers = 1 if spec.pipeline_mode else 2
                    total += buffers * bytes_of(spec.block_shape, array.dtype)
            asked.append(total)
            return [shape and jnp.zeros(shape.shape, shape.dtype) for shape in out_shape]

        return call

    monkeypatch.setattr(pl, "pallas_call", pallas_call)
    itemsize = jnp.dtype(dtype).itemsize
    for side, inputs, stage in blocks_of(name, total_stride):
        window = make_window(stage.kernel, stage.stride, (side, side), "same")
        channels = inputs, inputs * stage.expand, stage.channels
        block = KernelPlan(strips(window, *channels, itemsize=itemsize), 1, 1e-3, "silu")

        def loss(x, params, block=block):
            return mbconv(x, params, block)[0].sum()

        x = jnp.zeros((LANES, side, side, inputs), dtype)
        jax.eval_shape(jax.grad(loss, argnums=(0, 1)), x, make_params(channels, stage.kernel))
    assert 0.5 * grid._VMEM < max(asked) < grid._VMEM - 2**20
