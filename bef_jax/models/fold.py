"""Inference without batch normalisation: its fixed statistics go into the convolutions.

At inference norm(conv(x)) = conv(x) * multiplier + shift, which is a convolution with a scaled
kernel and a bias (Jacob et al. 2018, section 3.2). This saves a pass over each feature map
where a backend does not fuse the two, and the files for serving have fewer tensors.
"""

from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax


def fold_batch_norm(variables: dict, epsilon: float) -> dict:
    """Returns the variables of the same network made with `folded=True`.

    Args:
        variables: {params, batch_stats} of a network. A norm `X_norm` follows the convolution
            `X_conv` or `X` beside it, which has no bias. A norm with neither beside it does not
            directly follow a convolution, as in DenseNet, and does not change.
        epsilon: `config.model.bn_epsilon`.

    Returns:
        {params}, float32: kernels are scaled, and a folded norm keeps only its bias. Also
        {batch_stats} of the norms that are not folded, if there are any.
    """
    # flatten_dict makes new dicts, so the code below does not change the caller's, which training
    # still uses.
    params = flatten_dict(variables["params"])
    statistics = flatten_dict(variables["batch_stats"])
    # Statistics show what is a norm: other layers with a bias (squeeze-excite, the classifier) have
    # none.
    # Sorted, because a set of strings has another order in each process. A jitted caller would be a
    # different program each time, and would compile although the cache has it.
    for norm_path in sorted({path[:-1] for path in statistics}):
        kernel_path = _kernel_before(norm_path, params)
        if kernel_path is None:
            continue
        mean, var = statistics.pop((*norm_path, "mean")), statistics.pop((*norm_path, "var"))
        # [C], float32. `layers.BatchNorm` has the same terms in inference, so only the order of
        # roundings differs.
        multiplier = params.pop((*norm_path, "scale")) * lax.rsqrt(var + epsilon)
        params[*norm_path, "bias"] -= mean * multiplier
        # Every kernel's last axis is its outputs.
        params[kernel_path] = params[kernel_path] * multiplier
    kept = {"batch_stats": unflatten_dict(statistics)} if statistics else {}
    return {"params": unflatten_dict(params), **kept}


def _kernel_before(
    norm_path: tuple[str, ...], params: dict[tuple, Array]
) -> tuple[str, ...] | None:
    *scope, name = norm_path
    stem = name.removesuffix("_norm")
    # DenseNet calls a norm before a convolution input_norm. Nothing beside it is called input_conv,
    # so it is not mistaken for a norm after a convolution.
    candidates = (*scope, f"{stem}_conv", "kernel"), (*scope, stem, "kernel")
    return next((path for path in candidates if path in params), None)
