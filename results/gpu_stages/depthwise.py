"""The stage `micro`: depthwise convolutions alone, in both forms."""

import argparse
import dataclasses
import functools
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bef_jax.models.layers import padding_of
from bef_jax.models.ops.depthwise import Padding, depthwise_conv, output_size
from gpu_stages import emit
from gpu_stages.timing import timed


@dataclasses.dataclass(frozen=True)
class Shape:
    """A depthwise convolution: images, side, channels, kernel side, stride; how many blocks."""

    images: int
    side: int
    channels: int
    kernel: int
    stride: int
    blocks: int

    def padding(self) -> Padding:
        """Returns the zeros around the maps."""
        return padding_of(self.kernel, self.stride, (self.side, self.side), "same")

    def arrays(self) -> list[Array]:
        """Returns random maps, a kernel and a gradient of the outputs, bfloat16."""
        sides = output_size((self.side, self.side), self.kernel, self.stride, self.padding())
        shapes = [
            (self.images, self.side, self.side, self.channels),
            (self.kernel, self.kernel, 1, self.channels),
            (self.images, *sides, self.channels),
        ]
        keys = jax.random.split(jax.random.key(0), 3)
        pairs = zip(keys, shapes, strict=True)
        return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in pairs]


# Those of B3 at total stride 32, each for the blocks that are like it or nearly so.
SHAPES = [
    Shape(256, 48, 144, 3, 2, 1), Shape(256, 24, 192, 3, 1, 2), Shape(256, 24, 192, 5, 2, 1),
    Shape(256, 12, 288, 5, 1, 2), Shape(256, 6, 576, 3, 1, 4), Shape(256, 6, 816, 5, 1, 4),
    Shape(256, 3, 1392, 5, 1, 5),
]  # fmt: skip
TINY_SHAPES = [Shape(4, 12, 16, 3, 2, 1), Shape(4, 6, 16, 5, 1, 1)]


def micro(options: argparse.Namespace) -> None:
    """Times each depthwise convolution and its gradients alone, in both forms."""
    shapes = TINY_SHAPES if options.tiny else SHAPES
    arrays = {shape: shape.arrays() for shape in shapes}
    jobs = list(itertools.product(shapes, ("x", "kernel", "output"), ("native", "shift")))
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(lambda job: compile_conv(*job, arrays[job[0]]), jobs))
    record = {"compile_seconds": time.perf_counter() - start, "rows": []}
    for (shape, work, form), program in zip(jobs, programs, strict=True):
        inputs = arrays[shape]
        value = np.asarray(program(*inputs), np.float32)
        if form == "native":
            expected = value
        error = float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
        row = {"shape": dataclasses.astuple(shape), "work": work, "form": form}
        row["us"] = round(1e6 * timed(program, *inputs, count=20), 1)
        # What one read and one write of the maps moves: the least that any form needs.
        row["map_bytes"] = inputs[0].nbytes + inputs[2].nbytes
        record["rows"].append(row | {"difference_from_native": error})
        emit(record)


def compile_conv(shape: Shape, work: str, form: str, arrays: list[Array]) -> jax.stages.Compiled:
    """Compiles a convolution's output, or its gradient by the maps x or the kernel."""
    stride, padding = shape.stride, shape.padding()
    conv = functools.partial(depthwise_conv, stride=stride, padding=padding, form=form)

    def function(x: Array, kernel: Array, g: Array) -> Array:
        if work == "output":
            return conv(x, kernel)
        _, pullback = jax.vjp(conv, x, kernel)
        return pullback(g)[0 if work == "x" else 1]

    return jax.jit(function).lower(*arrays).compile()
