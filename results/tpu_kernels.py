"""Counts the cycles of the block's kernels in the compiler's schedule for a TPU v5e; runs none.

    pip install -e .[plan]
    python results/tpu_kernels.py [--total_stride=32]

Each kernel of each different block of EfficientNet-B3 is compiled in a process of its own, for 256
images. libtpu writes the kernel's instructions to a file, as bundles that a core runs in one cycle
each. A kernel's cycles are the number of bundles times the turns of the loops that they are in.
This assumes that nothing waits. It leaves out memory, and what XLA does between kernels.
"""

import argparse
import collections
import dataclasses
import functools
import glob
import os
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bef_jax.models import boosted
from bef_jax.models.efficientnet import scaled
from bef_jax.models.layers import padding_of
from bef_jax.models.ops.mbconv import backward, forward, grid
from bef_jax.planning import topology

IMAGES = 256
KERNELS = (
    "expand_and_convolve",
    "pool",
    "project",
    "project_gradients",
    "expand_and_convolve_gradients",
)
# A line of the program: its address, LB where a loop begins, and a > for each loop around it.
BUNDLE = re.compile(r"\s*(?:\d+:\s*)?0x[0-9a-f]+\s+(LB|[A-Z]{2})?\s*:\s?(>*)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A block: side of its input; input, hidden and output channels; kernel side; stride."""

    side: int
    inputs: int
    hidden: int
    outputs: int
    kernel: int
    stride: int

    def strips(self) -> tuple[grid.Strip, ...]:
        """Returns the strips into which the network cuts the block, in bfloat16."""
        size = (self.side, self.side)
        padding = padding_of(self.kernel, self.stride, size, "same")
        window = grid.Window(size, self.kernel, self.stride, padding)
        return grid.strips(window, self.inputs, self.hidden, self.outputs, itemsize=2)


def main() -> None:
    """Prints a line per block and the sum; with --compile, only compiles one kernel."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--total_stride", type=int, default=32)
    parser.add_argument("--compile", nargs=8, metavar="X", help="internal: compile one kernel")
    options = parser.parse_args()
    if options.compile:
        name, strip, *numbers = options.compile
        shape = Shape(*map(int, numbers))
        compile_kernel(name, shape, shape.strips()[int(strip)])
        return
    total = 0
    for shape, blocks in shapes_of_b3(options.total_stride).items():
        cycles = sum(
            kernel_cycles(name, shape, index)
            for index in range(len(shape.strips()))
            for name in KERNELS
        )
        total += blocks * cycles
        print(f"{blocks} x {shape}, {len(shape.strips())} strips: {cycles / 1e6:.3f} M", flush=True)
    print(f"all: {total / 1e6:.1f} M cycles for {IMAGES} images")


def shapes_of_b3(total_stride: int) -> dict[Shape, int]:
    """Returns how many blocks of B3 have each shape, for images of 96 x 96."""
    architecture, counts = scaled("b3"), collections.Counter()
    stem, stages = boosted.reduce_downsampling(2, architecture.stages, total_stride)
    side, channels = 96 // stem, architecture.stem
    for stage in stages:
        for index in range(stage.repeats):
            stride = 1 if index else stage.stride
            hidden = channels * stage.expand
            counts[Shape(side, channels, hidden, stage.channels, stage.kernel, stride)] += 1
            side, channels = -(-side // stride), stage.channels
    return dict(counts)


def kernel_cycles(name: str, shape: Shape, index: int) -> int:
    """Returns the scheduled cycles of one kernel on one strip."""
    strip = shape.strips()[index]
    numbers = map(str, (name, index, *dataclasses.astuple(shape)))
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, __file__, "--compile", *numbers]
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        # One branch of `lax.platform_dependent` calls the kernel, so the file's name has "branch_".
        files = glob.glob(f"{folder}/*branch_*-final_bundles.txt")
        (program,) = (file for file in files if "schedule" not in file)
        outside, loops = count_bundles(program)
    turns = turns_of(name, shape, strip)
    if len(loops) != len(turns):
        raise RuntimeError(f"{name} of {shape} has {len(loops)} loops, not {len(turns)}")
    blocks = shape.hidden // strip.channels
    inside = sum(bundles * turn for bundles, turn in zip(loops, turns, strict=True))
    return IMAGES // grid.LANES * (blocks * outside + inside)


def count_bundles(file: str) -> tuple[int, list[int]]:
    """Returns the bundles of one turn of the grid: those outside of loops, and each loop's."""
    outside, loops, within = 0, [], False
    with open(file) as lines:
        for match in filter(None, map(BUNDLE.match, lines)):
            depth = len(match[2])
            if depth > 1 and (match[1] == "LB" or not within):
                loops.append(0)
            if depth > 1:
                loops[-1] += 1
            outside += depth == 1
            within = depth > 1
    # A branch that most turns do not take looks like a loop of a few bundles: count it as outside.
    return outside + sum(n for n in loops if n < 20), [n for n in loops if n >= 20]


def turns_of(name: str, shape: Shape, strip: grid.Strip) -> list[int]:
    """Returns how often each loop turns for a block of images, in the order of the program."""
    window, expands = strip.window, shape.inputs != shape.hidden
    blocks = shape.hidden // strip.channels
    rows, height, padded = window.size[0], window.outputs[0], window.padded[0]
    if name == "expand_and_convolve":  # clears, expands, convolves
        return [padded, blocks * rows, blocks * height]
    if name == "project":  # clears, adds up, copies
        return [height, blocks * height, height]
    if name != "expand_and_convolve_gradients":
        return [blocks * height]
    phases = (window.inside(0, phase) for phase in range(window.stride))
    by_phase = [blocks * (last - first) for first, last in phases]
    ends = [rows] if expands else []
    first = [padded, padded + window.margin, blocks * rows, blocks * height, blocks * height]
    return [*first, *ends, *by_phase, *ends]


def compile_kernel(name: str, shape: Shape, strip: grid.Strip) -> None:
    """Compiles one kernel for a v5e."""
    devices = topology.make_mesh(topology.parse("v5e:2x2")).devices[:1]
    everywhere = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())

    def array(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=everywhere)

    half = functools.partial(array, dtype=jnp.bfloat16)
    hidden, window = shape.hidden, strip.window
    x = half(*window.size, shape.inputs, IMAGES)
    d, dy = (half(*window.outputs, channels, IMAGES) for channels in (hidden, shape.outputs))
    weights = half(hidden, shape.outputs)
    expand, shift = half(hidden, shape.inputs), array(hidden, 1)
    if shape.inputs == hidden:
        expand = shift = None
    taps, norm, gate = array(hidden, window.kernel**2), array(hidden, 2), array(hidden, IMAGES)
    block = strip.channels
    calls = {
        "expand_and_convolve": (
            lambda *a: forward.expand_and_convolve(*a, strip, "silu"),
            (x, expand, shift, taps),
        ),
        "pool": (lambda *a: forward.pool(*a, block, "silu"), (d, norm)),
        "project": (lambda *a: forward.project(*a, block, "silu"), (d, norm, gate, weights)),
        "project_gradients": (
            lambda *a: backward.project_gradients(*a, block, "silu"),
            (d, dy, norm, gate, weights),
        ),
        "expand_and_convolve_gradients": (
            lambda *a: backward.expand_and_convolve_gradients(*a, strip, "silu"),
            (x, d, dy, (expand, taps, weights, array(hidden, 5)), array(2, hidden, IMAGES)),
        ),
    }
    function, arguments = calls[name]
    jax.jit(function).lower(*arguments).compile()


if __name__ == "__main__":
    main()
