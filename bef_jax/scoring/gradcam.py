"""Grad-CAM (Selvaraju et al. 2017): which part of a patch supports the decision."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from bef_jax.data import augment
from bef_jax.models import create
from bef_jax.models.fold import fold_batch_norm
from bef_jax.scoring.scorer import padded_rows

_BATCH = 8  # patches per call, so that one small program serves any number of them


def make_explainer(
    config: ConfigDict, variables: dict
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns `explain(images, called)`, which computes Grad-CAM maps.

    It takes patches, uint8 [n, S, S, 3], and the class that each was called, int [n]. It returns
    maps, float32 [n, S, S], of what supports that decision. A map is the mean of one map per fused
    stage (eq. 1 and 2). Each of those is scaled to a sum of 1, so that coarse and fine stages count
    the same, or is 0 where the stage has nothing that supports the decision.
    """
    model = create(config.model, folded=True)
    # Copy to the host, because one process explains alone, and others own some of the devices.
    variables = jax.device_get(variables)
    targets = fused_outputs(model)

    @jax.jit
    def explain_batch(variables: dict, images: Array, called: Array) -> Array:
        # Fold inside this program, because folding by itself would be another one to compile.
        folded = fold_batch_norm(variables, config.model.bn_epsilon)
        inputs = augment.eval_inputs(images, config)
        maps = stage_maps(model, folded, inputs, called, targets)
        patch_maps = [_to_patch(heat, inputs.shape[1], images.shape[1]) for heat in maps]
        return sum(patch_maps) / len(patch_maps)

    def explain(images: np.ndarray, called: np.ndarray) -> np.ndarray:
        called = np.asarray(called, np.int32)
        batches = padded_rows(len(images), _BATCH)  # so that all calls have one shape
        maps = [
            np.asarray(explain_batch(variables, images[rows], called[rows])) for rows in batches
        ]
        return np.concatenate(maps)[: len(images)]

    return explain


def fused_outputs(model: nn.Module) -> list[str]:
    """Returns the names of the modules that output the features of the fused stages.

    A stage's module is its attention, or its last block if it has no attention. Without fusion,
    only the last stage counts, because the classifier sees no other.
    """
    last = (len(model.architecture.stages),)
    return [
        f"attention_{number}"
        if model.attention != "none" and number in model.fused_stages()
        else f"block_{model.block_indices(number)[-1]:02d}"
        for number in (model.fused_stages() if model.fusion else last)
    ]


def stage_maps(
    model: nn.Module, variables: dict, inputs: Array, called: Array, targets: list[str]
) -> list[Array]:
    """Returns the Grad-CAM map of each target, [N, H, W], with no negative values.

    Args:
        inputs: normalised [N, S, S, 3].
        called: int [N], the class of each patch whose support is mapped.
        targets: names of modules directly below the network, which return [N, H, W, C].
    """

    def summed_log_odds(offsets: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        # Add each offset where the features come out. The gradient with respect to an offset of 0
        # is the gradient with respect to the features, so the network needs no change.
        features = {}

        def intercept(call, args, kwargs, context):
            result = call(*args, **kwargs)
            name = context.module.name
            if name not in targets or context.method_name != "__call__":
                return result
            features[name] = result
            return result + offsets[name] if offsets else result

        with nn.intercept_methods(intercept):
            logits = model.apply(variables, inputs, train=False)
        # Patches do not mix in inference, so the sum's gradient holds each patch's own gradient.
        return jnp.sum(log_odds_of(logits, called)), features

    # eval_shape finds the shapes without a run: the network runs once, for the gradient.
    shapes = jax.eval_shape(lambda: summed_log_odds({})[1])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    gradients, features = jax.grad(summed_log_odds, has_aux=True)(zeros)
    return [_cam(features[name], gradients[name]) for name in targets]


def log_odds_of(logits: Array, classes: Array) -> Array:
    """Returns the log-odds of one class of each patch against all others, [N].

    They are used instead of the class's own logit, because adding a number to all logits changes no
    probability. Of two classes, they are the difference of the logits.

    Args:
        logits: [N, K].
        classes: int [N].
    """
    is_own = classes[:, None] == jnp.arange(logits.shape[1])
    own = jnp.sum(logits, axis=1, where=is_own)
    return own - jax.nn.logsumexp(logits, axis=1, where=~is_own)


def _cam(features: Array, gradients: Array) -> Array:
    weights = gradients.mean((1, 2), keepdims=True)  # eq. 1
    return nn.relu((weights * features).sum(-1))  # eq. 2


def _to_patch(heat: Array, size: int, side: int) -> Array:
    """Resizes maps [N, H, W] to the central `size` that the network saw, in [N, side, side].

    Each map then has a sum of 1, or stays 0.
    """
    heat = jax.image.resize(heat, (len(heat), size, size), "linear")
    total = heat.sum((1, 2), keepdims=True)
    heat = heat / jnp.where(total > 0, total, 1)
    margin = (side - size) // 2
    return jnp.pad(heat, [(0, 0), (margin, margin), (margin, margin)])
