"""EfficientNet (Tan & Le 2019): B0 to B7 by compound scaling, and Lite0 to Lite4."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bef_jax.models.layers import (
    Conv,
    DepthwiseConv,
    DropPath,
    PointwiseKernel,
    SqueezeExcite,
    global_pool,
    padding_of,
)
from bef_jax.models.network import Network
from bef_jax.models.ops.mbconv.block import Block, mbconv
from bef_jax.models.ops.mbconv.grid import LANES, Window, strips


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one shape; the stride is the first block's, the others have 1."""

    expand: int
    channels: int
    repeats: int
    kernel: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What tells one EfficientNet from another; total stride 32."""

    stem: int
    stages: tuple[Stage, ...]
    head: int
    activation: str = "silu"
    squeeze_excite: bool = True


# The paper's Table 1.
B0 = Architecture(
    stem=32,
    stages=(
        Stage(expand=1, channels=16, repeats=1, kernel=3, stride=1),
        Stage(expand=6, channels=24, repeats=2, kernel=3, stride=2),
        Stage(expand=6, channels=40, repeats=2, kernel=5, stride=2),
        Stage(expand=6, channels=80, repeats=3, kernel=3, stride=2),
        Stage(expand=6, channels=112, repeats=3, kernel=5, stride=1),
        Stage(expand=6, channels=192, repeats=4, kernel=5, stride=2),
        Stage(expand=6, channels=320, repeats=1, kernel=3, stride=1),
    ),
    head=1280,
)

# One block per resolution, narrow where maps are large: end-to-end tests and the first look take
# seconds to compile.
TEST = Architecture(
    stem=16,
    stages=(
        Stage(expand=1, channels=16, repeats=1, kernel=3, stride=1),
        Stage(expand=1, channels=24, repeats=1, kernel=3, stride=2),
        Stage(expand=2, channels=32, repeats=1, kernel=3, stride=2),
        Stage(expand=4, channels=40, repeats=1, kernel=5, stride=2),
        Stage(expand=4, channels=64, repeats=1, kernel=3, stride=2),
    ),
    head=128,
)

# (width, depth) of the paper's compound scaling.
SCALING = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
}
LITE_SCALING = {
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}


def scaled(variant: str) -> Architecture:
    """B0 with its channels and repeats scaled to `variant` (b0 ... b7)."""
    return _scale(*SCALING[variant])


def _scale(width: float, depth: float) -> Architecture:
    def scale(stage: Stage) -> Stage:
        # Up, not to the nearest, as in the paper's code: B3 would have 22 blocks, not 26.
        repeats = math.ceil(stage.repeats * depth)
        channels = round_channels(stage.channels * width)
        return dataclasses.replace(stage, channels=channels, repeats=repeats)

    stages = tuple(scale(stage) for stage in B0.stages)
    return Architecture(round_channels(B0.stem * width), stages, round_channels(B0.head * width))


def lite(variant: str) -> Architecture:
    """EfficientNet-Lite (lite0 ... lite4): made for integers and slow devices.

    ReLU6, no squeeze-excite; stem and head keep B0's width, the first and last stage their repeats.
    Source: the efficientnet/lite README of tensorflow/tpu, 2020; there is no paper.
    """
    network = _scale(*LITE_SCALING[variant])
    first, *middle, last = network.stages
    # Lite scales neither end: B0's first and last stage have one block, and keep it.
    stages = (
        dataclasses.replace(first, repeats=B0.stages[0].repeats),
        *middle,
        dataclasses.replace(last, repeats=B0.stages[-1].repeats),
    )
    return Architecture(B0.stem, stages, B0.head, activation="relu6", squeeze_excite=False)


def round_channels(channels: float) -> int:
    """The nearest multiple of 8 that is not more than 10% below, as in the paper's code."""
    # 11 would be 8, a quarter less, and becomes 16.
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class MBConv(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise, squeeze-excite, project 1x1, residual."""

    stage: Stage
    stride: int
    drop_path: float
    dtype: jnp.dtype
    depthwise: functools.partial
    norm: functools.partial
    activation: str = "silu"
    squeeze_excite: bool = True
    form: str = "layers"

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        inputs = x
        # Layers make the parameters, and the one form has those of the other.
        block = self._kernel_block(x.shape) if train and not self.is_initializing() else None
        x = self._by_layers(x, train) if block is None else self._by_kernels(x, block)
        # No activation: on few channels it would lose what it sets to 0 (Sandler et al. 2018,
        # section 3.2).
        x = self.norm(name="project_norm")(x, train)
        # No block of stride 2 keeps its channels, so shapes tell where there is a residual.
        if x.shape != inputs.shape:
            return x
        return DropPath(self.drop_path)(x, train) + inputs

    def _by_layers(self, x: Array, train: bool) -> Array:
        stage, inputs = self.stage, x.shape[-1]
        active = functools.partial(self.norm, activation=self.activation)
        if stage.expand != 1:
            # The kernel, not its product: where positions are many the norm takes its statistics
            # from the narrow input, and saves passes over the hidden maps, the network's largest.
            kernel = PointwiseKernel(inputs * stage.expand, self.dtype, name="expand_conv")(inputs)
            x = active(name="expand_norm")(x, train, kernel)
        # [N, H', W', hidden] from here to the projection.
        x = self.depthwise(stage.kernel, self.stride, name="depthwise_conv")(x)
        x = active(name="depthwise_norm")(x, train)
        if self.squeeze_excite:
            # A quarter of the block's input, not of its hidden features: as in the paper's code.
            x = SqueezeExcite(max(inputs // 4, 1), name="squeeze_excite")(x)
        return Conv(stage.channels, kernel=1, dtype=self.dtype, name="project_conv")(x)

    def _by_kernels(self, x: Array, block: Block) -> Array:
        params = self.variables["params"]
        names = [name for name in params if name != "project_norm"]
        x, statistics = mbconv(x, {name: params[name] for name in names}, block)
        for name, moments in statistics.items():
            self.norm(name=name).record(*moments)
        return x

    def _kernel_block(self, shape: tuple[int, ...]) -> Block | None:
        """What the kernels have to know; None where the network is one of layers."""
        stage, norm = self.stage, self.norm(parent=None)
        if self.form == "layers":
            return None
        if shape[0] % (norm.groups * LANES):
            raise ValueError(
                f"kernels take {LANES} images at a time, of each of {norm.groups} groups"
            )
        padding = padding_of(
            stage.kernel, self.stride, shape[1:3], self.depthwise.keywords["padding"]
        )
        window = Window(shape[1:3], stage.kernel, self.stride, padding)
        channels = shape[-1], shape[-1] * stage.expand, stage.channels
        cut = strips(window, *channels, jnp.dtype(self.dtype).itemsize)
        return Block(cut, norm.groups, norm.epsilon, self.activation)


class EfficientNet(Network):
    """B0 to B7, Lite0 to Lite4, by their architecture; `Network` has the switches."""

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Images [N, H, W, 3], normalised, -> logits [N, num_classes], float32."""
        norm = functools.partial(self.norm(), activation=self.architecture.activation)
        stem_stride, stages = self.strides()
        stem = Conv(self.architecture.stem, 3, stem_stride, self.padding, self.dtype, name="stem")
        x = norm(name="stem_norm")(stem(images), train)
        x, pooled = self.trunk(x, stages, functools.partial(self._stage, train=train))
        # [N, H', W', C] -> [N, H', W', head]; of a 96 px patch 3x3 positions, or 6x6, or 12x12.
        x = Conv(self.architecture.head, 1, dtype=self.dtype, name="head")(x)
        x = norm(name="head_norm")(x, train)
        return self.classify([*pooled, global_pool(x)], train)

    def _stage(self, x: Array, number: int, stage: Stage, train: bool) -> Array:
        depthwise = functools.partial(
            DepthwiseConv, padding=self.padding, form=self.depthwise, dtype=self.dtype
        )
        switches = self.architecture.activation, self.architecture.squeeze_excite, self.mbconv
        for index in self.blocks(number):
            stride = stage.stride if index == self.blocks(number)[0] else 1
            layers = (self.drop_rate(index), self.dtype, depthwise, self.norm())
            # A name without the stride: weights of total stride 32 fit 16 and 8.
            block = self.block(MBConv)(stage, stride, *layers, *switches, name=f"block_{index:02d}")
            x = block(x, train)
        return x
