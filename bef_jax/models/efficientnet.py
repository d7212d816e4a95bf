"""EfficientNet (Tan & Le 2019): B0 to B7, made by compound scaling, and Lite0 to Lite4."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bef_jax.models.layers import (
    Conv,
    DepthwiseConv,
    DropPath,
    SqueezeExcite,
    global_pool,
    padding_of,
    pointwise_conv_norm,
)
from bef_jax.models.network import Network
from bef_jax.models.ops.gpu_norm import norm_excite_project
from bef_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one shape. The stride is that of the first block; the others have stride 1."""

    expand: int
    channels: int
    repeats: int
    kernel: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What differs between EfficientNets.

    The strides of `stages` are for total_stride=32; see `Network.stem_stride_and_stages`.
    """

    stem: int
    stages: tuple[Stage, ...]
    head: int
    activation: str = "silu"
    squeeze_excite: bool = True


# Table 1 of Tan & Le 2019.
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

# TEST has one block per resolution, and few channels where maps are large, so that end-to-end tests
# and the quickstart compile in seconds.
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
    """Returns B0 with its channels and repeats scaled to `variant` (b0 ... b7)."""
    return _scale(*SCALING[variant])


def _scale(width: float, depth: float) -> Architecture:
    def scale(stage: Stage) -> Stage:
        # Round up, as in the paper's code. Rounded to the nearest, B3 would have 22 blocks, not 26.
        repeats = math.ceil(stage.repeats * depth)
        channels = round_channels(stage.channels * width)
        return dataclasses.replace(stage, channels=channels, repeats=repeats)

    stages = tuple(scale(stage) for stage in B0.stages)
    return Architecture(round_channels(B0.stem * width), stages, round_channels(B0.head * width))


def lite(variant: str) -> Architecture:
    """Returns EfficientNet-Lite (lite0 ... lite4), made for integer arithmetic and slow devices.

    It has ReLU6 and no squeeze-excite. The stem and the head keep B0's width. The first and the
    last stage keep B0's repeats.
    Source: the efficientnet/lite README of tensorflow/tpu, 2020; there is no paper.
    """
    first, *middle, last = _scale(*LITE_SCALING[variant]).stages
    # B0's first and last stage have one block each, and Lite does not scale this number.
    stages = (
        dataclasses.replace(first, repeats=B0.stages[0].repeats),
        *middle,
        dataclasses.replace(last, repeats=B0.stages[-1].repeats),
    )
    return Architecture(B0.stem, stages, B0.head, activation="relu6", squeeze_excite=False)


def round_channels(channels: float) -> int:
    """Returns the nearest multiple of 8 that is not more than 10% below, as in the paper's code."""
    # For example, 11 becomes 16, because 8 would be 27% below.
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class MBConv(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise, squeeze-excite, project 1x1, residual.

    Attributes:
        stride: stride of this block; `stage.stride` is that of the stage's first block.
        norm: norm(name=...) makes a norm without activation.
        active_norm: active_norm(name=...) makes a norm with the activation after it.
        padding, depthwise, mbconv: as in `Network`.
        norm_options: (bn_groups, bn_epsilon, activation), for norms inside larger operations.
    """

    stage: Stage
    stride: int
    drop_path: float
    squeeze_excite: bool
    norm: Callable[..., nn.Module]
    active_norm: Callable[..., nn.Module]
    padding: str
    depthwise: str
    mbconv: str
    norm_options: tuple[int, float, str]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        inputs = x
        # Initialisation uses the layers, because only they make parameters. The kernels read these.
        if self.mbconv == "pallas" and train and not self.is_initializing():
            x = self._by_kernels(x)
        else:
            x = self._by_layers(x, train)
        # No activation follows: with few channels it would lose information (Sandler et al. 2018,
        # section 3.2, shown for ReLU).
        x = self.norm(name="project_norm")(x, train)
        # A residual needs equal shapes. Every block of stride 2 changes the number of channels, so
        # equal shapes also mean stride 1, even on a map of one position.
        if x.shape != inputs.shape:
            return x
        return DropPath(self.drop_path)(x, train) + inputs

    def _by_layers(self, x: Array, train: bool) -> Array:
        stage, channels_in = self.stage, x.shape[-1]
        if stage.expand != 1:
            hidden = channels_in * stage.expand
            x = pointwise_conv_norm(x, hidden, self.active_norm, "expand", train)
        # [N, H', W', hidden] from here to the projection.
        x = DepthwiseConv(
            kernel=stage.kernel,
            stride=self.stride,
            padding=self.padding,
            form=self.depthwise,
            dtype=self.dtype,
            name="depthwise_conv",
        )(x)
        # Initialisation uses the layers, because only they make parameters.
        if self.squeeze_excite and train and sharding.for_gpu() and not self.is_initializing():
            return self._excite_and_project(x)
        x = self.active_norm(name="depthwise_norm")(x, train)
        if self.squeeze_excite:
            # As in the paper's code, this is a quarter of the block's input, not of its hidden
            # features.
            x = SqueezeExcite(max(channels_in // 4, 1), name="squeeze_excite")(x)
        return Conv(stage.channels, kernel=1, dtype=self.dtype, name="project_conv")(x)

    def _excite_and_project(self, x: Array) -> Array:
        """Computes the rest of `_by_layers` in training as one operation, for GPUs."""
        params = self.variables["params"]
        norm, excite = params["depthwise_norm"], params["squeeze_excite"]
        kernel = params["project_conv"]["kernel"][0, 0]
        x, *moments = norm_excite_project(x, norm, excite, kernel, *self.norm_options)
        self.norm(name="depthwise_norm").record(*moments)
        return x

    def _by_kernels(self, x: Array) -> Array:
        """Computes the same as `_by_layers` in training, by experimental Pallas kernels for TPU."""
        # Imported here, because Pallas takes 0.1 s that a start without these kernels need not.
        from bef_jax.models.ops.mbconv.block import mbconv, plan_kernels
        from bef_jax.models.ops.mbconv.grid import Window

        stage, (groups, epsilon, activation) = self.stage, self.norm_options
        padding = padding_of(stage.kernel, self.stride, x.shape[1:3], self.padding)
        window = Window(x.shape[1:3], stage.kernel, self.stride, padding)
        plan = plan_kernels(window, x, stage.expand, stage.channels, groups, epsilon, activation)
        params = self.variables["params"]
        names = [name for name in params if name != "project_norm"]
        x, statistics = mbconv(x, {name: params[name] for name in names}, plan)
        for name, moments in statistics.items():
            self.norm(name=name).record(*moments)
        return x


class EfficientNet(Network):
    """An EfficientNet, B0 to B7 or Lite0 to Lite4. `Network` has the switches."""

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits [N, num_classes], float32, from normalised images [N, H, W, 3]."""
        architecture, pooled = self.architecture, []
        norm, active_norm = self.make_norm(), self.make_norm(activation=architecture.activation)
        stem_stride, stages = self.stem_stride_and_stages()
        x = Conv(
            features=architecture.stem,
            kernel=3,
            stride=stem_stride,
            padding=self.padding,
            dtype=self.dtype,
            name="stem",
        )(images)
        x = active_norm(name="stem_norm")(x, train)
        for number, stage in enumerate(stages, 1):
            for index in self.block_indices(number):
                block = self.maybe_remat(MBConv)(
                    stage=stage,
                    stride=stage.stride if index == self.block_indices(number)[0] else 1,
                    drop_path=self.drop_rate(index),
                    squeeze_excite=architecture.squeeze_excite,
                    norm=norm,
                    active_norm=active_norm,
                    padding=self.padding,
                    depthwise=self.depthwise,
                    mbconv=self.mbconv,
                    norm_options=(self.bn_groups, self.bn_epsilon, architecture.activation),
                    dtype=self.dtype,
                    # No stride in the name, so weights of total stride 32 also fit 16 and 8.
                    name=f"block_{index:02d}",
                )
                x = block(x, train)
            x = self.attend_and_fuse(x, number, pooled)  # a fused stage appends to pooled
        # [N, H', W', C] -> [N, H', W', head]. A 96 px patch has 3x3, 6x6 or 12x12 positions here.
        x = Conv(architecture.head, kernel=1, dtype=self.dtype, name="head")(x)
        x = active_norm(name="head_norm")(x, train)
        return self.classify([*pooled, global_pool(x)], train)
