"""DenseNet-121 (Huang et al. 2017), as torchvision has it: every layer sees all before it."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bef_jax.models.layers import Conv, average_pool, global_pool, max_pool
from bef_jax.models.network import Network

_BOTTLENECK = 4  # features of a layer's 1x1 convolution, over its growth


@dataclasses.dataclass(frozen=True)
class Stage:
    """A dense block; the stride is that of the pooling before it.

    In stage 1 this is the stem's max-pool, in the others the transition's average pool.
    """

    repeats: int
    stride: int = 2


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What tells one DenseNet from another; total stride 32."""

    stem: int
    growth: int
    stages: tuple[Stage, ...]


# The paper's Table 1.
DENSENET121 = Architecture(
    stem=64,
    growth=32,
    stages=(Stage(repeats=6), Stage(repeats=12), Stage(repeats=24), Stage(repeats=16)),
)


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1, norm, ReLU, 3x3 to `growth` features, which join those of the input.

    Attributes:
        input_norm: makes the norm of the input, with a ReLU after it, by its name.
        norm: makes the norm after the 1x1, with a ReLU after it.
    """

    growth: int
    input_norm: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = functools.partial(Conv, dtype=self.dtype)
        # [N, H, W, C] -> [N, H, W, 4 growth] -> [N, H, W, growth]: the 3x3 sees as many features in
        # the last layer as in the first.
        y = self.input_norm(name="input_norm")(x, train)
        y = conv(_BOTTLENECK * self.growth, kernel=1, name="bottleneck_conv")(y)
        y = self.norm(name="bottleneck_norm")(y, train)
        y = conv(self.growth, kernel=3, name="growth_conv")(y)
        # New features go last: the parameters of a norm then belong to the same channels as in
        # torchvision.
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 to half the features, average pool of `stride` x `stride`."""

    stride: int
    input_norm: Callable[..., nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = self.input_norm(name="input_norm")(x, train)
        # Both are linear and the convolution mixes no positions, so the pool may come first: the
        # product has a quarter of the positions then.
        # At total stride 8 the last transition has a side of 1: a pool that does nothing.
        x = average_pool(x, self.stride)
        return Conv(x.shape[-1] // 2, kernel=1, dtype=self.dtype, name="conv")(x)


class DenseNet(Network):
    """DenseNets with bottlenecks, by their architecture; `Network` has the switches.

    A norm before its convolution stays a norm when the network is folded.
    """

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Images [N, H, W, 3], normalised, -> logits [N, num_classes], float32."""
        # Each layer sees features that other norms see as well, so no convolution before an
        # input_norm can take it in.
        input_norm = self.norm(activation="relu", folded=False)
        norm, pooled = self.norm(activation="relu"), []
        stem_stride, stages = self.strides()
        x = Conv(
            features=self.architecture.stem,
            kernel=7,
            stride=stem_stride,
            padding=self.padding,
            dtype=self.dtype,
            name="stem",
        )(images)
        x = norm(name="stem_norm")(x, train)
        # The stride of stage 1. Reduced downsampling leaves it alone: it takes the stride of the
        # stem, and then the last one.
        x = max_pool(x, self.padding)
        for number, stage in enumerate(stages, 1):
            if number > 1:
                x = Transition(
                    stride=stage.stride,
                    input_norm=input_norm,
                    dtype=self.dtype,
                    name=f"transition_{number - 1}",
                )(x, train)
            for index in self.block_indices(number):
                layer = self.maybe_remat(DenseLayer)(
                    growth=self.architecture.growth,
                    input_norm=input_norm,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"block_{index:02d}",
                )
                x = layer(x, train)
            x = self.boost(x, number, pooled)
        # What is fused of a stage is its features before any norm, as the next stage gets them.
        x = input_norm(name="head_norm")(x, train)
        return self.classify([*pooled, global_pool(x)], train)
