"""The layers that the networks are built of.

Activations have the dtype of the configuration; parameters, batch statistics and every reduction
over positions or images are float32.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from bef_jax.models.depthwise import Padding, depthwise_conv

# Variance 2 / fan_out, as in the EfficientNet paper's code; a depthwise kernel's fan_out is k * k.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's own


def padding_of(kernel: int, stride: int, size: tuple[int, int], convention: str) -> Padding:
    """Zeros before and after height and width.

    `same` is TensorFlow's: the output is ceil(size / stride), and an odd zero goes after.
    `symmetric` is torch's: (kernel - 1) // 2 on every side. They differ at stride 2 only.
    """
    if convention == "symmetric":
        return (((kernel - 1) // 2,) * 2,) * 2
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
        kernel = self.param("kernel", conv_init, shape).astype(self.dtype)
        if self.kernel == self.stride == 1:
            return _pointwise(x.astype(self.dtype), kernel[0, 0])
        pads = padding_of(self.kernel, self.stride, x.shape[1:3], self.padding)
        strides = (self.stride, self.stride)
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x.astype(self.dtype), kernel, strides, pads, dimension_numbers=layout
        )


def _pointwise(x: Array, kernel: Array) -> Array:
    """A 1 x 1 convolution as the product of two matrices.

    Two axes, not four: the kernel's gradient then needs no transposed copy of x on CPU.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


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


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) over every axis but the last.

    Attributes:
        momentum: share of the running statistics that a step keeps: torch's 0.1 is 0.9 here.
        epsilon: added to the variance.
        groups: the batch is cut into this many consecutive parts with statistics of their own. One
            part per device needs no collective; their mean enters the running statistics.
        silu: applies SiLU to the result. One gradient for both keeps x alone, where two would keep
            what lies between them as well, and pass over it once more.
    """

    momentum: float = 0.9
    epsilon: float = 1e-3
    groups: int = 1
    dtype: jnp.dtype = jnp.float32
    silu: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        if not train:
            multiplier = scale * lax.rsqrt(var.value + self.epsilon)
            y = x * multiplier + (bias - mean.value * multiplier)
            return (nn.silu(y) if self.silu else y).astype(self.dtype)
        y, batch_mean, batch_var = batch_norm(x, scale, bias, self.groups, self.epsilon, self.silu)
        if not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * batch_mean.mean(0)
            var.value = keep * var.value + (1 - keep) * batch_var.mean(0)
        return y.astype(self.dtype)


class Bias(nn.Module):
    """What is left of a folded batch normalisation (`fold.fold_batch_norm`): x + bias."""

    dtype: jnp.dtype = jnp.float32
    silu: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if train:
            raise ValueError("a folded network has no batch statistics left to train")
        y = x + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(self.dtype)
        return nn.silu(y) if self.silu else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm(
    x: Array, scale: Array, bias: Array, groups: int, epsilon: float, silu: bool = False
):
    """Normalises each of `groups` parts of the batch by its own statistics, then maybe SiLU.

    The statistics come from one pass over x (E[x^2] - E[x]^2). The gradient is the closed form, and
    computes from x again what it needs: on every platform that is cheaper than memory.

    Args:
        x: [N, ..., C]; N a multiple of `groups`.
        scale, bias: [C], float32.

    Returns:
        y like x; mean and (biased) variance [groups, C], float32, through which no gradient flows.
    """
    return _batch_norm_forward(x, scale, bias, groups, epsilon, silu)[0]


def _batch_norm_forward(x, scale, bias, groups: int, epsilon: float, silu: bool):
    parts = x.reshape(groups, -1, *x.shape[1:]).astype(jnp.float32)
    axes = tuple(range(1, parts.ndim - 1))
    mean = jnp.mean(parts, axes, keepdims=True)
    square = jnp.mean(parts * parts, axes, keepdims=True)
    var = jnp.maximum(square - mean * mean, 0.0)
    multiplier = scale * lax.rsqrt(var + epsilon)
    y = parts * multiplier + (bias - mean * multiplier)
    y = nn.silu(y) if silu else y
    statistics = mean.reshape(groups, -1), var.reshape(groups, -1)
    return (y.reshape(x.shape).astype(x.dtype), *statistics), (x, scale, bias, mean, var)


def _batch_norm_backward(groups: int, epsilon: float, silu: bool, residuals, cotangents):
    x, scale, bias, mean, var = residuals
    x = lax.optimization_barrier(x)  # or XLA would keep the forward pass's sigmoid in memory
    parts = x.reshape(groups, -1, *x.shape[1:]).astype(jnp.float32)
    upstream = cotangents[0].reshape(parts.shape).astype(jnp.float32)
    axes = tuple(range(1, parts.ndim - 1))
    inverse = lax.rsqrt(var + epsilon)
    if silu:
        upstream = upstream * _silu_slope((parts - mean) * (inverse * scale) + bias)
    by_bias = jnp.sum(upstream, axes, keepdims=True)
    by_scale = (jnp.sum(upstream * parts, axes, keepdims=True) - mean * by_bias) * inverse
    count = parts.size // (groups * x.shape[-1])
    normalised = (parts - mean) * inverse
    by_x = scale * inverse * (upstream - (by_bias + normalised * by_scale) / count)
    total = functools.partial(jnp.sum, axis=tuple(range(parts.ndim - 1)))
    return by_x.reshape(x.shape).astype(x.dtype), total(by_scale), total(by_bias)


def _silu_slope(x: Array) -> Array:
    sigmoid = nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def global_pool(x: Array) -> Array:
    """The mean over positions, [N, H, W, C] -> [N, C], in float32."""
    return jnp.mean(x, (1, 2), dtype=jnp.float32)


class SqueezeExcite(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): gates each channel by the image's pooled features.

    The gate is computed in float32 from `hidden` features.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
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
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1, 1))
        return x * (mask / keep).astype(x.dtype)
