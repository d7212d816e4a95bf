"""ResNet-50 (He et al. 2016) in version 1.5, as in torchvision, where the 3x3 has the stride."""

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
    """Bottlenecks of one shape. The first has the stride; in stage 1, the max-pool has it."""

    channels: int
    repeats: int
    stride: int = 2


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes that differ between ResNets with bottlenecks, at total stride 32."""

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
    """Reduce 1x1 to a quarter of `channels`, 3x3, expand 1x1; add the shortcut, then ReLU.

    Attributes:
        norm: norm(name=...) makes a norm without activation.
        active_norm: active_norm(name=...) makes a norm with a ReLU after it.
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
        # In version 1.5, whose weights torchvision has, the stride is here. In the 1x1 before, a
        # stride would leave three of four positions unread.
        y = conv(hidden, kernel=3, stride=self.stride, name="spatial_conv")(y)
        y = self.active_norm(name="spatial_norm")(y, train)
        y = conv(self.channels, kernel=1, name="expand_conv")(y)
        # The ReLU follows the sum, because here it would make the residual nonnegative.
        y = self.norm(name="expand_norm")(y, train)
        # Stage 1 has a shortcut convolution, too. It has no stride, but four times the stem's
        # channels.
        if x.shape != y.shape:
            x = conv(self.channels, kernel=1, stride=self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train)
        return nn.relu(DropPath(self.drop_path)(y, train) + x)


class ResNet(Network):
    """A ResNet with bottlenecks. `Network` has the switches."""

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits [N, num_classes], float32, from normalised images [N, H, W, 3]."""
        norm, active_norm, pooled = self.make_norm(), self.make_norm(activation="relu"), []
        stem_stride, stages = self.stem_stride_and_stages()
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
                # The max-pool already has the stride of stage 1. Thus stem and stages have a total
                # stride of 32 in every family, and reduced downsampling needs no exception.
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
            x = self.attend_and_fuse(x, number, pooled)  # a fused stage appends to pooled
        # If the last stage is fused, its pooled features are already those of the head.
        head = [] if self.fusion and len(stages) in self.fused_stages() else [global_pool(x)]
        return self.classify([*pooled, *head], train)
