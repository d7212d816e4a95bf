"""DenseNet-121 (Huang et al. 2017), as in torchvision: every layer reads all layers before it."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bef_jax.models.layers import Conv, average_pool, global_pool, max_pool
from bef_jax.models.network import Network

_BOTTLENECK = 4  # features of a layer's 1x1 convolution, divided by its growth


@dataclasses.dataclass(frozen=True)
class Stage:
    """A dense block. The stride is that of the pool before it.

    This is the stem's max-pool for stage 1, and the transition's average pool for the others.
    """

    repeats: int
    stride: int = 2


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes that differ between DenseNets, at total stride 32."""

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
    """Norm, ReLU, 1x1, norm, ReLU, 3x3 to `growth` features, which are appended to the input's.

    Attributes:
        input_norm: input_norm(name=...) makes the input's norm, with a ReLU after it.
        norm: norm(name=...) makes the norm after the 1x1, with a ReLU after it.
    """

    growth: int
    input_norm: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = functools.partial(Conv, dtype=self.dtype)
        # [N, H, W, C] -> [N, H, W, 4 growth] -> [N, H, W, growth]. So the 3x3 reads the same number
        # of features in all layers.
        y = self.input_norm(name="input_norm")(x, train)
        y = conv(_BOTTLENECK * self.growth, kernel=1, name="bottleneck_conv")(y)
        y = self.norm(name="bottleneck_norm")(y, train)
        y = conv(self.growth, kernel=3, name="growth_conv")(y)
        # New features go last, so that a norm's parameters belong to the same channels as in
        # torchvision.
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 to half of the features, average pool of `stride` x `stride`."""

    stride: int
    input_norm: Callable[..., nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = self.input_norm(name="input_norm")(x, train)
        # The pool may come first, because both are linear and the convolution mixes no positions.
        # Then the product has a quarter of the positions.
        # At total stride 8, the last transition has stride 1, so its pool does nothing.
        x = average_pool(x, self.stride)
        return Conv(x.shape[-1] // 2, kernel=1, dtype=self.dtype, name="conv")(x)


class DenseNet(Network):
    """A DenseNet with bottlenecks. `Network` has the switches.

    A norm that comes before its convolution stays a norm when the network is folded.
    """

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits [N, num_classes], float32, from normalised images [N, H, W, 3]."""
        # An input_norm reads features that other norms read, too. So it cannot be folded into the
        # convolutions that made them.
        input_norm = self.make_norm(activation="relu", folded=False)
        norm, pooled = self.make_norm(activation="relu"), []
        stem_stride, stages = self.stem_stride_and_stages()
        x = Conv(
            features=self.architecture.stem,
            kernel=7,
            stride=stem_stride,
            padding=self.padding,
            dtype=self.dtype,
            name="stem",
        )(images)
        x = norm(name="stem_norm")(x, train)
        # This pool has the stride of stage 1. Reduced downsampling does not remove it, because it
        # removes the stem's stride first, and then the last stage's.
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
            x = self.attend_and_fuse(x, number, pooled)  # a fused stage appends to pooled
        # Fusion pools a stage's features before any norm, as the next stage gets them.
        x = input_norm(name="head_norm")(x, train)
        return self.classify([*pooled, global_pool(x)], train)
