"""Attention by CBAM (Woo et al. 2018), one of the changes of Boosted EfficientNet.

The abstract of the paper (see `boosted`) does not say how attention is built or where it stands;
the version here follows CBAM and is our own choice.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bef_jax.models.layers import conv_init, global_pool

# A larger value comes nearer to the maximum, and sends more of the gradient to one position.
_SHARPNESS = 2.0  # r of the smooth maximum
# Units of the hidden layer. Stages of 24 channels would have one, 24 // 16, and the gates of all
# channels would depend on one number.
_MIN_HIDDEN = 8


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
