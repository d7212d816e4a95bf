"""The layers that the networks are built of.

Activations have the dtype of the configuration. Parameters, batch statistics and the reductions
over positions or images that layers make are float32.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from bef_jax.models.ops.activations import ACTIVATIONS
from bef_jax.models.ops.depthwise import Padding, depthwise_conv
from bef_jax.models.ops.norm import batch_norm, pointwise_batch_norm
from bef_jax.models.ops.pointwise import pointwise
from bef_jax.runtime import sharding

# The variance is 2 / fan_out, as in the EfficientNet paper's code. The fan_out of a depthwise
# kernel is k * k, which is what Flax computes as its fan_in.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's own


def padding_of(kernel: int, stride: int, size: tuple[int, int], convention: str) -> Padding:
    """Returns how many zeros go before and after height and width.

    `same` is TensorFlow's: the output has ceil(size / stride), and an odd zero goes after.
    `symmetric` is torch's: (kernel - 1) // 2 on every side. They differ only at stride 2.
    """
    if convention == "symmetric":
        side = (kernel - 1) // 2
        return (side, side), (side, side)
    # It depends on the map's size: at stride 2, a 3x3 on an even side pads 0 before and 1 after.
    return tuple(lax.padtype_to_pads(size, (kernel, kernel), (stride, stride), "SAME"))


class Conv(nn.Module):
    """A dense k x k convolution without bias: [N, H, W, C] -> [N, H', W', features]."""

    features: int
    kernel: int
    stride: int = 1
    padding: str = "same"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        # The parameter is float32, because bfloat16 would lose an update below 1/256 of a weight.
        kernel = self.param("kernel", conv_init, shape).astype(self.dtype)
        if self.kernel == self.stride == 1:
            # This is a matrix product, and `pointwise` has the best layout for each platform.
            return pointwise(x.astype(self.dtype), kernel[0, 0])
        pads = padding_of(self.kernel, self.stride, x.shape[1:3], self.padding)
        strides = (self.stride, self.stride)
        # These are Linen's layouts. Weights of other packages are transposed when they are read.
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x.astype(self.dtype), kernel, strides, pads, dimension_numbers=layout
        )


class DepthwiseConv(nn.Module):
    """A depthwise k x k convolution without bias: [N, H, W, C] -> [N, H', W', C]."""

    kernel: int
    stride: int = 1
    padding: str = "same"
    form: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel, self.kernel, 1, x.shape[-1])
        kernel = self.param("kernel", depthwise_init, shape).astype(self.dtype)
        pads = padding_of(self.kernel, self.stride, x.shape[1:3], self.padding)
        return depthwise_conv(x.astype(self.dtype), kernel, self.stride, pads, self.form)


# From this many positions per input channel on, a covariance of the K input channels is cheaper
# than statistics of the C output channels (`norm.pointwise_batch_norm`).
_POSITIONS_PER_CHANNEL = 8
# On a GPU the covariance takes about ten more kernels, so that only large maps gain.
_POSITIONS_PER_CHANNEL_ON_GPU = 1024


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) over every axis but the last.

    Attributes:
        momentum: share of the running statistics that a step keeps; torch's 0.1 is 0.9 here.
        epsilon: added to the variance.
        groups: number of consecutive parts of the batch that have their own statistics. One part
            per device needs no collective. The running statistics get the mean over the parts.
        activation: a name in `ACTIVATIONS`, applied to the result. One gradient rule
            for both keeps one map less than two rules (`norm`).
    """

    momentum: float = 0.9
    epsilon: float = 1e-3
    groups: int = 1
    dtype: jnp.dtype = jnp.float32
    activation: str = "none"

    @nn.compact
    def __call__(self, x: Array, train: bool, kernel: Array | None = None) -> Array:
        """Normalises x, or x @ kernel if the kernel [K, C] of a 1 x 1 convolution is given.

        The kernel comes from `pointwise_conv_norm`.
        """
        # (C,). With a kernel, x has K channels.
        channels = (x if kernel is None else kernel).shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        if not train:
            # This is one multiplication and one addition per element, less than (x - mean) / std
            # with its scale and bias.
            multiplier = scale * lax.rsqrt(var.value + self.epsilon)
            # Without a kernel, `pointwise` returns x.
            y = pointwise(x, kernel) * multiplier + (bias - mean.value * multiplier)
            return ACTIVATIONS[self.activation](y).astype(self.dtype)
        y, batch_mean, batch_var = self._normalise(x, kernel, scale, bias)
        # An init with train=True sees a batch without meaning, so the statistics stay at 0 and 1.
        if not self.is_initializing():
            self.record(batch_mean, batch_var)
        return y.astype(self.dtype)

    def record(self, batch_mean: Array, batch_var: Array) -> None:
        """Updates the running statistics with those of a batch, [groups, C]."""
        # The variance is the biased one, as in Flax; torch keeps n / (n - 1) times it. With groups
        # it is the mean of the groups' variances, because training normalises by these. The
        # differences between the groups' means do not count.
        for name, batch in (("mean", batch_mean), ("var", batch_var)):
            running = self.get_variable("batch_stats", name)
            running = self.momentum * running + (1 - self.momentum) * batch.mean(0)
            self.put_variable("batch_stats", name, running)

    def _normalise(self, x: Array, kernel: Array | None, scale: Array, bias: Array):
        options = (self.groups, self.epsilon, self.activation)
        # N H W / groups. With few positions and a large K, as in late maps, the [K, K] covariance
        # would cost more than the passes that it saves.
        positions = x.size // (x.shape[-1] * self.groups)
        least = _POSITIONS_PER_CHANNEL_ON_GPU if sharding.for_gpu() else _POSITIONS_PER_CHANNEL
        if kernel is not None and positions >= least * x.shape[-1]:
            return pointwise_batch_norm(x, kernel, scale, bias, *options)
        return batch_norm(pointwise(x, kernel), scale, bias, *options)


class Bias(nn.Module):
    """The bias that remains of a folded batch normalisation (`fold.fold_batch_norm`): x + bias."""

    dtype: jnp.dtype = jnp.float32
    activation: str = "none"

    @nn.compact
    def __call__(self, x: Array, train: bool, kernel: Array | None = None) -> Array:
        if train:
            raise ValueError("a folded network has no batch statistics left to train")
        x = pointwise(x, kernel)
        y = x + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(self.dtype)
        return ACTIVATIONS[self.activation](y)


class _PointwiseKernel(nn.Module):
    """The kernel of a 1 x 1 convolution, [1, 1, K, features], without the convolution."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # It has four axes like every convolution's kernel, so that code that reads and writes
        # weights needs no exception.
        return self.param("kernel", conv_init, (1, 1, x.shape[-1], self.features))


def pointwise_conv_norm(
    x: Array, features: int, norm: Callable[..., nn.Module], name: str, train: bool
) -> Array:
    """Applies a 1 x 1 convolution and its norm as one operation, in the scope of the caller.

    If there are many positions, the norm takes its statistics from the narrow x, not from the
    product (`norm.pointwise_batch_norm`). This saves passes over the product, the largest map.

    Args:
        x: [N, H, W, K].
        features: C, channels of the result.
        norm: norm(name=...) makes a `BatchNorm` or a `Bias`.
        name: parameters are called <name>_conv and <name>_norm, like those of two layers.

    Returns:
        [N, H, W, C].
    """
    kernel = _PointwiseKernel(features, name=f"{name}_conv")(x)[0, 0].astype(x.dtype)
    return norm(name=f"{name}_norm")(x, train, kernel)


def global_pool(x: Array) -> Array:
    """Returns the mean over positions, [N, H, W, C] -> [N, C], in float32."""
    # A bfloat16 number has 8 significant bits, so that a sum of ones would stop at 256. A map has
    # up to 9216 positions.
    return jnp.mean(x, (1, 2), dtype=jnp.float32)


def max_pool(x: Array, padding: str) -> Array:
    """Returns the maximum of 3 x 3 positions at stride 2, [N, H, W, C] -> [N, H', W', C]."""
    # Linen pads with -inf, not 0, so that a padded position is never the maximum.
    return nn.max_pool(x, (3, 3), (2, 2), padding_of(3, 2, x.shape[1:3], padding))


def average_pool(x: Array, side: int) -> Array:
    """Returns the mean of each side x side square, without incomplete ones at far edges."""
    window = (side, side)
    return nn.avg_pool(x.astype(jnp.float32), window, window).astype(x.dtype)


class SqueezeExcite(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): gates each channel by the image's pooled features.

    The gate is computed in float32 from `hidden` features.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # [N, C] -> [N, hidden] -> [N, C]. There is one product per image, not per position, so
        # float32 costs next to nothing compared with the maps.
        gate = nn.silu(nn.Dense(self.hidden, kernel_init=conv_init, name="reduce")(global_pool(x)))
        gate = nn.sigmoid(nn.Dense(x.shape[-1], kernel_init=conv_init, name="expand")(gate))
        return x * gate[:, None, None].astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops whole images from a residual branch."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if not train or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        # There is one draw per image of the global batch, so that a run on eight devices drops the
        # same images as a run on one device.
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1, 1))
        # Training scales the kept images up, so that inference has nothing to do.
        return x * (mask / keep).astype(x.dtype)
