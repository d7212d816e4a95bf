"""ResNet-50 (He et al. 2016), version 1.5 as torchvision has it: the stride is in the 3x3."""

import dataclasses
import functools

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
    """Reduce 1x1 to a quarter of `channels`, 3x3, expand 1x1; added to the shortcut, then ReLU."""

    channels: int
    stride: int
    drop_path: float
    padding: str
    dtype: jnp.dtype
    norm: functools.partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = functools.partial(Conv, padding=self.padding, dtype=self.dtype)
        active = functools.partial(self.norm, activation="relu")
        hidden = self.channels // 4
        y = active(name="reduce_norm")(conv(hidden, 1, name="reduce_conv")(x), train)
        # The stride here, not in the 1x1 before, which would leave three of four positions unread:
        # that is version 1.5, whose weights torchvision has.
        y = conv(hidden, 3, self.stride, name="spatial_conv")(y)
        y = active(name="spatial_norm")(y, train)
        y = conv(self.channels, 1, name="expand_conv")(y)
        # The ReLU is for the sum: here it would make the residual nonnegative.
        y = self.norm(name="expand_norm")(y, train)
        # Also in stage 1, which has no stride but four times the stem's channels.
        if x.shape != y.shape:
            x = conv(self.channels, 1, self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train)
        return nn.relu(DropPath(self.drop_path)(y, train) + x)


class ResNet(Network):
    """ResNets of bottlenecks, by their architecture; `Network` has the switches."""

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Images [N, H, W, 3], normalised, -> logits [N, num_classes], float32."""
        stem_stride, (first, *others) = self.strides()
        stem = Conv(self.architecture.stem, 7, stem_stride, self.padding, self.dtype, name="stem")
        x = self.norm()(activation="relu", name="stem_norm")(stem(images), train)
        x = max_pool(x, self.padding)
        # Stage 1's stride is the max-pool's: so counted, stem and stages come to 32 as in every
        # family, and reduced downsampling needs no exception. Here the blocks must not take it
        # again.
        stages = (dataclasses.replace(first, stride=1), *others)
        x, pooled = self.trunk(x, stages, functools.partial(self._stage, train=train))
        # Where the last stage is fused, the head's features, which it makes, are there already.
        head = [] if pooled and len(stages) in self.fused() else [global_pool(x)]
        return self.classify([*pooled, *head], train)

    def _stage(self, x: Array, number: int, stage: Stage, train: bool) -> Array:
        for index in self.blocks(number):
            stride = stage.stride if index == self.blocks(number)[0] else 1
            layers = (self.drop_rate(index), self.padding, self.dtype, self.norm())
            block = self.block(Bottleneck)(
                stage.channels, stride, *layers, name=f"block_{index:02d}"
            )
            x = block(x, train)
        return x
