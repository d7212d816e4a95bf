"""ResNet-50 (He et al. 2016), version 1.5 as torchvision has it: the stride is in the 3x3."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bef_jax.models.layers import Conv, DropPath, global_pool, max_pool
from bef_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bottlenecks of one shape; the first has the stride, in stage 1 the max-pool before it."""

    channels: int
    repeats: int
    stride: int = 2


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What tells one ResNet of bottlenecks from another; total stride 32."""

    stem: int
    stages: tuple[Stage, ...]


# The paper's Table 1.
RESNET50 = Architecture(
    stem=64,
    stages=(
        Stage(channels=256, repeats=3),
        Stage(channels=512, repeats=4),
        Stage(channels=1024, repeats=6),
        Stage(channels=2048, repeats=3),
    ),
)


class Bottleneck(nn.Module):
    """Reduce 1x1 to a quarter of `channels`, 3x3, expand 1x1; added to the shortcut, then ReLU.

    Attributes:
        norm: makes a norm without activation, by its name.
        active_norm: makes a norm with a ReLU after it.
    """

    channels: int
    stride: int
    drop_path: float
    norm: Callable[..., nn.Module]
    active_norm: Callable[..., nn.Module]
    padding: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = functools.partial(Conv, padding=self.padding, dtype=self.dtype)
        hidden = self.channels // 4
        y = conv(hidden, kernel=1, name="reduce_conv")(x)
        y = self.active_norm(name="reduce_norm")(y, train)
        # The stride is here, not in the 1x1 before, which would leave three of four positions
        # unread. This is version 1.5, whose weights torchvision has.
        y = conv(hidden, kernel=3, stride=self.stride, name="spatial_conv")(y)
        y = self.active_norm(name="spatial_norm")(y, train)
        y = conv(self.channels, kernel=1, name="expand_conv")(y)
        # The ReLU follows the sum: here it would make the residual nonnegative.
        y = self.norm(name="expand_norm")(y, train)
        # Also in stage 1, which has no stride but four times the channels of the stem.
        if x.shape != y.shape:
            x = conv(self.channels, kernel=1, stride=self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train)
        return nn.relu(DropPath(self.drop_path)(y, train) + x)


class ResNet(Network):
    """ResNets of bottlenecks, by their architecture; `Network` has the switches."""

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Images [N, H, W, 3], normalised, -> logits [N, num_classes], float32."""
        norm, active_norm, pooled = self.norm(), self.norm(activation="relu"), []
        stem_stride, stages = self.strides()
        x = Conv(
            features=self.architecture.stem,
            kernel=7,
            stride=stem_stride,
            padding=self.padding,
            dtype=self.dtype,
            name="stem",
        )(images)
        x = active_norm(name="stem_norm")(x, train)
        x = max_pool(x, self.padding)
        for number, stage in enumerate(stages, 1):
            for index in self.block_indices(number):
                # The max-pool has taken the stride of stage 1. So counted, stem and stages come
                # to 32 as in every family, and reduced downsampling needs no exception.
                strided = number > 1 and index == self.block_indices(number)[0]
                block = self.maybe_remat(Bottleneck)(
                    channels=stage.channels,
                    stride=stage.stride if strided else 1,
                    drop_path=self.drop_rate(index),
                    norm=norm,
                    active_norm=active_norm,
                    padding=self.padding,
                    dtype=self.dtype,
                    name=f"block_{index:02d}",
                )
                x = block(x, train)
            x = self.boost(x, number, pooled)
        # Where the last stage is fused, it has pooled the features of the head already.
        head = [] if pooled and len(stages) in self.fused() else [global_pool(x)]
        return self.classify([*pooled, *head], train)
