"""The cut of maps into strips and tiles that fit into the memory on a TPU's chip.

Maps are [H, W, C, N], with channels along the sublanes of a vector register and images along its
lanes. So another tap of a depthwise convolution reads another register, not a shifted one, and
little is padded. A kernel runs over tiles of 128 images and, within them, over tiles of the E
hidden channels.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bef_jax.errors import UserError
from bef_jax.models.ops.depthwise import Padding, output_size

# These are JAX's names of v5e, v5p and v6e. Older chips have only 16 MiB of vector memory, and for
# newer ones nothing was compiled.
KERNEL_CHIPS = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")

LANES = 128  # images of a tile
SUBLANES = 8  # channels of a register; the number of channels of a tile is a multiple of this
# Channels of a tile. Every 8 channels need their own instructions, and 96 are enough to keep the
# matrix unit busy.
_MOST_CHANNELS = 96
_VMEM = 58 * 2**20  # bytes, of 64 MiB on v5p and 128 MiB on v5e and v6e; XLA keeps the rest
_MOST_RESIDENT = 12 * 2**20  # bytes of a map that XLA may keep on the chip between kernels
_BUDGET = 56 * 2**20  # bytes that tiles are planned for; the compiler needs the rest of _VMEM


def check_batch(images: int, groups: int) -> None:
    """Raises `UserError` unless each of `groups` equal parts of a batch consists of whole tiles."""
    if images % (groups * LANES):
        raise UserError(
            f"config.model.mbconv=pallas takes {LANES} images at a time: set config.batch_size to "
            f"a multiple of {groups * LANES}"
        )


@dataclasses.dataclass(frozen=True)
class Window:
    """The geometry of a depthwise convolution.

    The map that it reads is padded and split into its phases, [A, stride, B, stride, C, N].
    Padded position (stride * a + p, stride * b + q) is element [a, p, b, q]. So the positions that
    a tap reads are consecutive at stride 2, too.
    """

    size: tuple[int, int]
    kernel: int
    stride: int
    padding: Padding

    @property
    def outputs(self) -> tuple[int, int]:
        """Returns H' and W'."""
        return output_size(self.size, self.kernel, self.stride, self.padding)

    @property
    def margin(self) -> int:
        """Returns how many zeros precede a padded output gradient: a tap's reach in a phase."""
        return (self.kernel - 1) // self.stride

    @property
    def padded(self) -> tuple[int, int]:
        """Returns A and B, large enough for all inputs and for all positions that taps read."""
        sides = zip(self.size, self.padding, self.outputs, strict=True)
        a, b = (max((n + pad[0] - 1) // self.stride + 1, m + self.margin) for n, pad, m in sides)
        return a, b

    @property
    def phases(self) -> tuple[int, int, int, int]:
        """Returns the shape of a padded map, without its channels and images."""
        return self.padded[0], self.stride, self.padded[1], self.stride

    @property
    def taps(self) -> list[tuple[int, int]]:
        """Returns all (i, j), in the order of a kernel's taps in memory."""
        return [(i, j) for i in range(self.kernel) for j in range(self.kernel)]

    def inside(self, axis: int, phase: int) -> tuple[int, int]:
        """Returns [start, stop) of the elements of a phase along an axis that are not padding."""
        before = self.padding[axis][0] - phase
        return -(-before // self.stride), (before + self.size[axis] - 1) // self.stride + 1


@dataclasses.dataclass(frozen=True)
class Strip:
    """Rows of a block's maps that the kernels take at once, for all columns.

    Attributes:
        inputs: [start, stop) of the rows of x, which include rows that neighbours read, too.
        outputs: [start, stop) of the rows of d and y.
        window: geometry of these rows. It has no padding at an end that is inside the map.
        channels: hidden channels that the kernels take at a time.
    """

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    window: Window
    channels: int


def strips(
    window: Window, inputs: int, hidden: int, outputs: int, itemsize: int
) -> tuple[Strip, ...]:
    """Cuts maps into the fewest strips of rows that fit on the chip with enough channels at a time.

    The arguments are those of `tile_channels`.

    Raises:
        UserError: not even one row fits.
    """
    height, channels = window.outputs[0], (inputs, hidden, outputs, itemsize)
    # Matrix products with 8 channels leave the matrix unit idle. It is faster to take 16 channels
    # at a time and more strips, although neighbours read a few rows of the map twice. Compiled for
    # v5e, B3's blocks of 48 x 48 then take 7.3 M cycles instead of 9.4 M.
    wanted = (SUBLANES,) if inputs == hidden else (2 * SUBLANES, SUBLANES)
    for least, count in itertools.product(wanted, range(1, height + 1)):
        ends = [height * i // count for i in range(count + 1)]
        found = tuple(_strip(window, *rows, *channels) for rows in itertools.pairwise(ends))
        if all(strip.channels >= least for strip in found):
            return found
    raise UserError(
        "config.model.mbconv=pallas: no kernel takes maps of "
        f"{window.size} with {hidden} channels: set config.model.mbconv=layers"
    )


def _strip(window: Window, start: int, stop: int, *channels: int) -> Strip:
    (top, _), columns = window.padding
    # The taps read the rows [read_start, read_stop), of which those outside of the map are padding.
    read_start = start * window.stride - top
    read_stop = (stop - 1) * window.stride + window.kernel - top
    rows = max(read_start, 0), min(read_stop, window.size[0])
    padding = (rows[0] - read_start, read_stop - rows[1]), columns
    part = Window((rows[1] - rows[0], window.size[1]), window.kernel, window.stride, padding)
    return Strip(rows, (start, stop), part, tile_channels(part, *channels))


def tile_channels(window: Window, inputs: int, hidden: int, outputs: int, itemsize: int) -> int:
    """Returns how many of a block's channels the kernels take at a time; 0 if none fit on the chip.

    Args:
        inputs, hidden, outputs: channels K, E and M; there is no expansion if K is E.
        itemsize: bytes of the activations' dtype.
    """
    size, result = math.prod(window.size), math.prod(window.outputs)
    padded = math.prod(window.phases)
    gradient = math.prod(side + window.margin for side in window.padded)
    # The bytes are per image, for the two kernels named below. bytes_whole is for the first one's
    # maps that have all channels, and one buffer. The other two are per channel of a tile:
    # bytes_common for both kernels, bytes_per_channel for the first. Scratch has one buffer. An
    # array that is loaded or written while the kernel works on another tile has two.
    bytes_common = 8 * window.kernel**2 + 72 + (window.padded[1] + 2 * result) * itemsize
    weight_tiles = sum(-(-channels // LANES) for channels in (inputs, outputs))
    bytes_common += 2 * (itemsize + 4) * weight_tiles
    bytes_whole = result * outputs * itemsize
    bytes_per_channel = bytes_common + (padded + gradient) * 4
    if inputs == hidden:
        bytes_per_channel += size * 4 * itemsize
    else:
        bytes_whole += size * inputs * (2 * itemsize + 4)
        bytes_per_channel += padded * itemsize
    most = min(
        (_BUDGET // LANES - bytes_whole) // bytes_per_channel,  # `expand_and_convolve_gradients`
        (_BUDGET // LANES - result * outputs * (itemsize + 4)) // bytes_common,  # `project`
        _MOST_CHANNELS,
    )
    sizes = range(SUBLANES, most + 1, SUBLANES)
    return max((tile for tile in sizes if hidden % tile == 0), default=0)


floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)  # an output of `call_kernel`


def call_kernel(
    kernel: Callable, inputs, outputs, scratch, tile: int, products: int, activations: int
):
    """Calls a kernel for every tile of images, and within them for every tile of channels.

    Args:
        inputs: pairs (array or None, function that makes its spec: `whole_spec`, `maps_spec`, ...).
        outputs: pairs (shape and dtype, or None; function that makes its spec).
        scratch: (shape, dtype), or None, of each array that a tile keeps on the chip.
        tile: channels of a tile.
        products: number of multiplications, each with an addition, for XLA's estimate of costs.
        activations: number of evaluations of an activation or its slope, for the same estimate.
    """
    arrays, shapes = [array for array, _ in inputs], [shape for shape, _ in outputs]
    given = [(array, to_spec) for array, to_spec in (*inputs, *outputs) if array is not None]
    *_, hidden, images = next(array.shape for array, to_spec in given if to_spec is maps_spec)
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array, _ in given)

    def call(*arrays: Array, interpret: bool):
        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid=(images // LANES, hidden // tile),
            in_specs=[_spec(array, to_spec, tile) for array, to_spec in inputs],
            out_specs=[_spec(shape, to_spec, tile) for shape, to_spec in outputs],
            scratch_shapes=[buffer and pltpu.VMEM(*buffer) for buffer in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products, transcendentals=activations, bytes_accessed=moved
            ),
            interpret=interpret,
        )(*arrays)

    def on_tpu(*arrays: Array):
        # Keep large maps in HBM, because the kernel itself loads their next tile while it works.
        # Otherwise XLA would first copy them to the chip as a whole, and move others away for them.
        # Small maps may stay on the chip.
        pairs = zip(arrays, inputs, strict=True)
        large = [to_spec is maps_spec and x.nbytes > _MOST_RESIDENT for x, (_, to_spec) in pairs]
        arrays = (_in_hbm(x) if flag else x for x, flag in zip(arrays, large, strict=True))
        return call(*arrays, interpret=False)

    # Other platforms interpret the kernel, slowly, with the same arithmetic. This is for tests.
    elsewhere = functools.partial(call, interpret=True)
    return lax.platform_dependent(*arrays, tpu=on_tpu, default=elsewhere)


def _in_hbm(x: Array) -> Array:
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def _spec(array, to_spec: Callable, tile: int) -> pl.BlockSpec | None:
    return None if array is None else to_spec(array.shape, tile)


def whole_spec(shape: Sequence[int], tile: int) -> pl.BlockSpec:
    """Returns the spec of maps [H, W, C, N] of few channels, which are not cut by channels.

    They stay on the chip while the kernel works on all channel tiles of a tile of images.
    """
    # They have one buffer, not two, so the next images' maps are loaded only after these are done.
    return pl.BlockSpec(
        (*shape[:-1], LANES), lambda n, e: (0, 0, 0, n), pipeline_mode=pl.Buffered(1)
    )


def maps_spec(shape: Sequence[int], tile: int) -> pl.BlockSpec:
    """Returns the spec of [..., E, N], cut by channels and by images."""
    rest = len(shape) - 2
    return pl.BlockSpec((*shape[:-2], tile, LANES), lambda n, e: (*(0,) * rest, e, n))


def weights_spec(shape: Sequence[int], tile: int) -> pl.BlockSpec:
    """Returns the spec of [..., E, K], cut by channels and the same for all images."""
    rest = len(shape) - 2
    return pl.BlockSpec((*shape[:-2], tile, shape[-1]), lambda n, e: (*(0,) * rest, e, 0))


def parts_spec(shape: Sequence[int], tile: int) -> pl.BlockSpec:
    """Returns the spec of [N / 128, ..., E, K], the sums of each tile of images."""
    rest = len(shape) - 3
    size = (None, *shape[1:-2], tile, shape[-1])
    return pl.BlockSpec(size, lambda n, e: (n, *(0,) * rest, e, 0))
