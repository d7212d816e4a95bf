"""EfficientNet (Tan & Le 2019), B0 to B7 by compound scaling; the boosts are switched by config."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bef_jax.models import boosted
from bef_jax.models.layers import (
    BatchNorm,
    Bias,
    Conv,
    DepthwiseConv,
    DropPath,
    PointwiseKernel,
    SqueezeExcite,
    dense_init,
    global_pool,
)


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


def scaled(variant: str) -> Architecture:
    """B0 with its channels and repeats scaled to `variant` (b0 ... b7)."""
    width, depth = SCALING[variant]

    def scale(stage: Stage) -> Stage:
        repeats = math.ceil(stage.repeats * depth)
        channels = round_channels(stage.channels * width)
        return dataclasses.replace(stage, channels=channels, repeats=repeats)

    stages = tuple(scale(stage) for stage in B0.stages)
    return Architecture(round_channels(B0.stem * width), stages, round_channels(B0.head * width))


def round_channels(channels: float) -> int:
    """The nearest multiple of 8 that is not more than 10% below, as in the paper's code."""
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

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        stage, inputs = self.stage, x
        conv = functools.partial(Conv, kernel=1, dtype=self.dtype)
        hidden = inputs.shape[-1] * stage.expand
        if stage.expand != 1:
            kernel = PointwiseKernel(hidden, self.dtype, name="expand_conv")(inputs.shape[-1])
            x = self.norm(silu=True, name="expand_norm")(x, train, kernel)
        x = self.depthwise(stage.kernel, self.stride, name="depthwise_conv")(x)
        x = self.norm(silu=True, name="depthwise_norm")(x, train)
        x = SqueezeExcite(max(inputs.shape[-1] // 4, 1), name="squeeze_excite")(x)
        x = self.norm(name="project_norm")(conv(stage.channels, name="project_conv")(x), train)
        if x.shape != inputs.shape:
            return x
        return DropPath(self.drop_path)(x, train) + inputs


class EfficientNet(nn.Module):
    """images [N, H, W, 3], normalised, -> logits [N, num_classes], float32.

    Attributes:
        total_stride: 32, 16 or 8 (`boosted.reduce_downsampling`).
        attention: `cbam` gates the output of every fused stage, on the trunk; or `none`.
        fusion: concatenates the pooled output of every fused stage to the head's features.
        fusion_stages: counted from 1; empty: the last stage of every resolution below the stem's.
        dropout: before the classifier; drop_path: of the last block, growing from 0 at the first.
        padding: where stride 2 pads: `same` (TensorFlow) or `symmetric` (torch).
        depthwise: the form of the depthwise convolution (`depthwise.depthwise_conv`).
        bn_groups: parts of the batch with statistics of their own (`layers.BatchNorm`).
        folded: for inference, with the variables that `fold.fold_batch_norm` makes.
    """

    architecture: Architecture
    num_classes: int = 1000
    total_stride: int = 32
    attention: str = "none"
    attention_reduction: int = 16
    attention_kernel: int = 7
    fusion: bool = False
    fusion_stages: tuple[int, ...] = ()
    dropout: float = 0.2
    drop_path: float = 0.2
    padding: str = "same"
    depthwise: str = "auto"
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-3
    bn_groups: int = 1
    folded: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        norm = self._norm()
        stem_stride, stages = boosted.reduce_downsampling(
            2, self.architecture.stages, self.total_stride
        )
        stem = Conv(self.architecture.stem, 3, stem_stride, self.padding, self.dtype, name="stem")
        x = norm(silu=True, name="stem_norm")(stem(images), train)
        x, pooled = self._trunk(x, stages, norm, train)
        x = Conv(self.architecture.head, 1, dtype=self.dtype, name="head")(x)
        x = norm(silu=True, name="head_norm")(x, train)
        features = jnp.concatenate([*pooled, global_pool(x)], axis=-1)
        features = nn.Dropout(self.dropout, deterministic=not train)(features)
        return nn.Dense(self.num_classes, kernel_init=dense_init, name="classifier")(features)

    def _norm(self) -> functools.partial:
        if self.folded:
            return functools.partial(Bias, self.dtype)
        return functools.partial(
            BatchNorm, self.bn_momentum, self.bn_epsilon, self.bn_groups, self.dtype
        )

    def _trunk(self, x: Array, stages: tuple[Stage, ...], norm, train: bool):
        """Returns the last stage's features and the pooled ones of the fused stages."""
        blocks = sum(stage.repeats for stage in stages)
        pooled, index = [], 0
        depthwise = functools.partial(
            DepthwiseConv, padding=self.padding, form=self.depthwise, dtype=self.dtype
        )
        for number, stage in enumerate(stages, 1):
            for repeat in range(stage.repeats):
                stride, rate = stage.stride if repeat == 0 else 1, self.drop_path * index / blocks
                name = f"block_{index:02d}"
                block = MBConv(stage, stride, rate, self.dtype, depthwise, norm, name=name)
                x, index = block(x, train), index + 1
            if number in self._fused():
                x = self._attend(x, number)
                pooled += [global_pool(x)] if self.fusion else []
        return x, pooled

    def _fused(self) -> tuple[int, ...]:
        strides = [stage.stride for stage in self.architecture.stages]
        return tuple(self.fusion_stages) or boosted.fused_stages(strides)

    def _attend(self, x: Array, number: int) -> Array:
        if self.attention == "none":
            return x
        cbam = boosted.CBAM(
            self.attention_reduction, self.attention_kernel, name=f"attention_{number}"
        )
        return cbam(x)
