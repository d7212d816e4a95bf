"""The changes that Boosted EfficientNet makes to a network of stages.

Wang et al., "Boosted EfficientNet: Detection of Lymph Node Metastases in Breast Cancer Using
Convolutional Neural Network", Cancers 2021, 13(4) 661. The first change, random center cropping, is
augmentation (`bef_jax.data.augment`). The abstract of the paper does not say how attention is built
or where it stands; the version here follows CBAM and is our own choice.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bef_jax.models.layers import conv_init, global_pool

# A larger value comes nearer to the maximum, and sends more of the gradient to one position.
_SHARPNESS = 2.0  # r of the smooth maximum
_MIN_HIDDEN = 8  # units of the hidden layer; a single unit may be dead from the start


def reduce_downsampling(stem_stride: int, stages: Sequence, total_stride: int) -> tuple[int, tuple]:
    """Lowers the network's total stride from 32 to 16 or 8 (RDS).

    16 removes the stem's stride, so every later map is twice as large. 8 also removes the stride of
    the last stage of stride 2. A 96 px patch ends in 3x3, 6x6 or 12x12 positions.

    Args:
        stages: dataclasses with a field `stride`; the total stride is 32 together with the stem.

    Returns:
        The stem's stride and the stages.
    """
    stages = list(stages)
    if total_stride == 8:
        # The last one, because only the maps after it grow, and these have the fewest positions.
        last = max(i for i, stage in enumerate(stages) if stage.stride == 2)
        stages[last] = dataclasses.replace(stages[last], stride=1)
    return (stem_stride if total_stride == 32 else 1), tuple(stages)


def fused_stages(strides: Sequence[int]) -> tuple[int, ...]:
    """Returns the last stage of every resolution below the stem's, counted from 1.

    In EfficientNet, these are stages 2, 3, 5 and 7, whose last blocks in B3 are 4, 7, 17 and 25.

    Args:
        strides: those of the stages at total stride 32, so that the choice is the same at 16 and 8.
    """
    # A resolution ends where the next stage has stride 2, and at the end of the network.
    following = [*strides[1:], 2]
    last_of_resolution = [i for i, stride in enumerate(following, 1) if stride == 2]
    # This leaves out stage 1 of EfficientNet, which has the stem's resolution, because the paper's
    # list begins with the last block of stage 2.
    return tuple(i for i in last_of_resolution if 2 in strides[:i])


def smooth_maximum(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns log(mean(exp(r x))) / r over `axes`, float32 (Pinheiro & Collobert 2015, eq. 6).

    It lies between the mean and the maximum. CBAM uses the maximum, which sends its whole gradient
    to one position. Where two positions differ only by rounding, the number of devices would decide
    between them. Runs on different numbers of devices would then differ by 3e-3 in the loss after
    20 steps; with the smooth maximum they differ by less than 1e-5.
    """
    count = math.prod(x.shape[axis] for axis in axes)
    # logsumexp subtracts the maximum first: exp(2 x) itself would overflow float32 beyond x = 44.
    scaled = _SHARPNESS * x.astype(jnp.float32)
    # log(count) is subtracted, so that a constant map of any size gives its own value. A gate that
    # was trained at one resolution then works at another.
    return (jax.nn.logsumexp(scaled, axes) - math.log(count)) / _SHARPNESS


class ChannelAttention(nn.Module):
    """Gates channels by their mean and smooth maximum, through one shared MLP (CBAM, eq. 2)."""

    reduction: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = max(x.shape[-1] // self.reduction, _MIN_HIDDEN)
        # Made once and called twice, so that both poolings share the weights. Inside the loop,
        # Linen would make separate weights for each.
        hidden = nn.Dense(width, kernel_init=conv_init)
        output = nn.Dense(x.shape[-1], kernel_init=conv_init)
        # [N, C] each, float32. The gate is rounded to x's dtype at the very end.
        pooled = [global_pool(x), smooth_maximum(x, (1, 2))]
        # [N, C]. The product broadcasts it as [N, 1, 1, C], so no map of the gate is kept.
        gate = nn.sigmoid(sum(output(nn.silu(hidden(features))) for features in pooled))
        return x * gate[:, None, None].astype(x.dtype)


class SpatialAttention(nn.Module):
    """Gates positions by a convolution over the channels' mean and smooth maximum (CBAM, eq. 3)."""

    kernel: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # [N, H, W] each, float32.
        maps = [jnp.mean(x, -1, dtype=jnp.float32), smooth_maximum(x, (3,))]
        window = (self.kernel, self.kernel)
        # [N, H, W, 2] -> [N, H, W, 1].
        gate = nn.Conv(1, window, kernel_init=conv_init)(jnp.stack(maps, axis=-1))
        return x * nn.sigmoid(gate).astype(x.dtype)


class CBAM(nn.Module):
    """Channel attention, then spatial attention (Woo et al. 2018): [N, H, W, C] -> [N, H, W, C].

    Every part is smooth: SiLU replaces ReLU, and a smooth maximum replaces the maximum.
    """

    reduction: int = 16
    kernel: int = 7

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # This order did best in table 3 of Woo et al.
        x = ChannelAttention(self.reduction, name="channel")(x)
        return SpatialAttention(self.kernel, name="spatial")(x)
