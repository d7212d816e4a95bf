"""DenseNet-121 (Huang et al. 2017), as torchvision has it: every layer sees all before it."""

import dataclasses
import functools

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
    """Norm, ReLU, 1x1, norm, ReLU, 3x3 to `growth` features, which join the input's."""

    growth: int
    dtype: jnp.dtype
    input_norm: functools.partial
    norm: functools.partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = functools.partial(Conv, dtype=self.dtype)
        # [N, H, W, C] -> [N, H, W, 4 growth] -> [N, H, W, growth]: the 3x3 sees as many features in
        # the last layer as in the first.
        y = self.input_norm(activation="relu", name="input_norm")(x, train)
        y = conv(_BOTTLENECK * self.growth, 1, name="bottleneck_conv")(y)
        y = self.norm(activation="relu", name="bottleneck_norm")(y, train)
        # New features go last: a norm's parameters then belong to the channels that torchvision's
        # do.
        return jnp.concatenate([x, conv(self.growth, 3, name="growth_conv")(y)], axis=-1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 to half the features, average pool of `stride` x `stride`."""

    stride: int
    dtype: jnp.dtype
    input_norm: functools.partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = self.input_norm(activation="relu", name="input_norm")(x, train)
        # Both are linear and the convolution mixes no positions, so the pool may come first: the
        # product has a quarter of the positions then.
        # At total stride 8 the last transition's side is 1: a pool that does nothing.
        x = average_pool(x, self.stride)
        return Conv(x.shape[-1] // 2, 1, dtype=self.dtype, name="conv")(x)


class DenseNet(Network):
    """DenseNets with bottlenecks, by their architecture; `Network` has the switches.

    A norm before its convolution stays one when the network is folded.
    """

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Images [N, H, W, 3], normalised, -> logits [N, num_classes], float32."""
        stem_stride, stages = self.strides()
        stem = Conv(self.architecture.stem, 7, stem_stride, self.padding, self.dtype, name="stem")
        x = self.norm()(activation="relu", name="stem_norm")(stem(images), train)
        # Stage 1's stride, which reduced downsampling leaves alone: it takes the stem's, then the
        # last.
        x = max_pool(x, self.padding)
        x, pooled = self.trunk(x, stages, functools.partial(self._stage, train=train))
        # What is fused of a stage is its features before any norm, as the next stage gets them.
        x = self.norm(folded=False)(activation="relu", name="head_norm")(x, train)
        return self.classify([*pooled, global_pool(x)], train)

    def _stage(self, x: Array, number: int, stage: Stage, train: bool) -> Array:
        # One for all layers of the stage: each sees features that other norms see as well, so that
        # no convolution before it can take it in.
        input_norm = self.norm(folded=False)
        if number > 1:
            name = f"transition_{number - 1}"
            x = Transition(stage.stride, self.dtype, input_norm, name=name)(x, train)
        for index in self.blocks(number):
            layers = (self.architecture.growth, self.dtype, input_norm, self.norm())
            x = self.block(DenseLayer)(*layers, name=f"block_{index:02d}")(x, train)
        return x
