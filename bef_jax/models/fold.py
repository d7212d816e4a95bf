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
        variables: {params, batch_stats} of a network in which a norm, `X_norm`, follows the
            bias-free convolution `X_conv` or `X` beside it. One with neither beside it comes before
            its convolution, as in DenseNet, and stays as it is.
        epsilon: `config.model.bn_epsilon`.

    Returns:
        {params}: kernels scaled, of every folded norm its bias alone; float32. Beside them
        {batch_stats} of the norms that stay, if any do.
    """
    # New dicts: what is popped and replaced below stays in the caller's, which training goes on
    # with.
    params = flatten_dict(variables["params"])
    statistics = flatten_dict(variables["batch_stats"])
    # A norm is what has statistics: biases elsewhere (squeeze-excite, the classifier) have none.
    # Sorted, since a set of strings has another order in each process: a jitted caller would be
    # another program each time, and compile although the cache has it.
    for norm in sorted({path[:-1] for path in statistics}):
        kernel = _kernel_before(norm, params)
        if kernel is None:
            continue
        mean, var = statistics.pop((*norm, "mean")), statistics.pop((*norm, "var"))
        # [C], float32. The same terms as `layers.BatchNorm` has without training, so that only the
        # order of roundings differs.
        multiplier = params.pop((*norm, "scale")) * lax.rsqrt(var + epsilon)
        params[*norm, "bias"] -= mean * multiplier
        params[kernel] = params[kernel] * multiplier  # all kernels have their outputs last
    kept = {"batch_stats": unflatten_dict(statistics)} if statistics else {}
    return {"params": unflatten_dict(params), **kept}


def _kernel_before(norm: tuple[str, ...], params: dict[tuple, Array]) -> tuple[str, ...] | None:
    *scope, name = norm
    stem = name.removesuffix("_norm")
    # DenseNet's norms before a convolution are called input_norm: nothing beside them is
    # input_conv, so they are not taken for norms that follow one.
    candidates = (*scope, f"{stem}_conv", "kernel"), (*scope, stem, "kernel")
    return next((path for path in candidates if path in params), None)
