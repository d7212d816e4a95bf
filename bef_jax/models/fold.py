"""Inference without batch normalisation: its fixed statistics go into the convolutions.

At inference norm(conv(x)) = conv(x) * multiplier + shift, which is a convolution with a scaled
kernel and a bias (Jacob et al. 2018, section 3.2). A feature map is then passed over once less
wherever a backend does not fuse the two, and what is shipped for serving has fewer tensors.
"""

from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax


def fold_batch_norm(variables: dict, epsilon: float) -> dict:
    """Returns the variables of the same network made with `folded=True`.

    Args:
        variables: {params, batch_stats} of a network in which every norm, `X_norm`, follows the
            bias-free convolution `X_conv` or `X` beside it.
        epsilon: `config.model.bn_epsilon`.

    Returns:
        {params}: kernels scaled, of every norm its bias alone; float32.
    """
    params = flatten_dict(variables["params"])
    statistics = flatten_dict(variables["batch_stats"])
    for norm in {path[:-1] for path in statistics}:
        mean, var = statistics[*norm, "mean"], statistics[*norm, "var"]
        multiplier = params.pop((*norm, "scale")) * lax.rsqrt(var + epsilon)
        params[*norm, "bias"] -= mean * multiplier
        kernel = _kernel_before(norm, params)
        params[kernel] = params[kernel] * multiplier  # all kernels have their outputs last
    return {"params": unflatten_dict(params)}


def _kernel_before(norm: tuple[str, ...], params: dict[tuple, Array]) -> tuple[str, ...]:
    *scope, name = norm
    stem = name.removesuffix("_norm")
    convolution = (*scope, f"{stem}_conv", "kernel")
    return convolution if convolution in params else (*scope, stem, "kernel")
