"""Grad-CAM (Selvaraju et al. 2017): which part of a patch spoke for the decision."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from bef_jax.data import augment
from bef_jax.data.patch import PATCH
from bef_jax.models import create
from bef_jax.models.fold import fold_batch_norm

_BATCH = 8  # patches in a call: one small program, whatever their number


def make_explainer(
    config: ConfigDict, variables: dict
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns `explain(images, called)`.

    It takes patches, uint8 [n, 96, 96, 3], and whether each was called positive, bool [n], and
    gives maps, float32 [n, 96, 96], of what spoke for that decision. Each map adds up to 1, or is
    0 where nothing spoke for it. A map is the mean over the fused stages of theirs (eq. 1 and 2),
    each brought to a sum of 1, so that coarse and fine ones count alike.
    """
    model = create(config.model, folded=True)
    # Off the devices, of which other processes have theirs: one alone explains.
    variables = jax.device_get(variables)
    targets = fused_outputs(model)

    @jax.jit
    def explain(variables: dict, images: Array, signs: Array) -> Array:
        # Within the program: by itself it would be another one to compile.
        folded = fold_batch_norm(variables, config.model.bn_epsilon)
        inputs = augment.eval_view(images, config)
        maps = stage_maps(model, folded, inputs, signs, targets)
        whole = [_spread(heat, inputs.shape[1]) for heat in maps]
        return sum(whole) / len(whole)

    def explain_all(images: np.ndarray, called: np.ndarray) -> np.ndarray:
        signs = np.where(called, 1, -1).astype(np.float32)
        found = []
        for first in range(0, len(images), _BATCH):
            # The last call is filled up with its last patch, and has the shape of the others.
            rows = np.minimum(np.arange(first, first + _BATCH), len(images) - 1)
            found.append(np.asarray(explain(variables, images[rows], signs[rows])))
        return np.concatenate(found)[: len(images)]

    return explain_all


def fused_outputs(model: nn.Module) -> list[str]:
    """The modules whose outputs are the features of the fused stages: attention, or last blocks.

    Without fusion, those of the last stage: the classifier sees no other.
    """
    last = (len(model.architecture.stages),)
    return [
        f"attention_{number}"
        if model.attention != "none" and number in model.fused()
        else f"block_{model.block_indices(number)[-1]:02d}"
        for number in (model.fused() if model.fusion else last)
    ]


def stage_maps(
    model: nn.Module, variables: dict, inputs: Array, signs: Array, targets: list[str]
) -> list[Array]:
    """Grad-CAM of each target, [N, H, W], not negative.

    Args:
        inputs: normalised [N, S, S, 3].
        signs: [N], 1 for what speaks for class 1 and -1 for what speaks for class 0.
        targets: names of modules directly below the network, which give [N, H, W, C].
    """

    def score(offsets: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        # Added where the features come out, so that the gradient by an offset of 0 is the one by
        # the features; the network itself need not know of it.
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
        # Patches do not mix in inference: the sum's gradient holds that of each by itself.
        return jnp.sum(signs * (logits[:, 1] - logits[:, 0])), features

    # By shapes alone: the network is run once, for the gradient.
    shapes = jax.eval_shape(lambda: score({})[1])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    gradients, features = jax.grad(score, has_aux=True)(zeros)
    return [_cam(features[name], gradients[name]) for name in targets]


def _cam(features: Array, gradients: Array) -> Array:
    weights = gradients.mean((1, 2), keepdims=True)  # eq. 1
    return nn.relu((weights * features).sum(-1))  # eq. 2


def _spread(heat: Array, size: int) -> Array:
    """[N, H, W] -> [N, 96, 96], of sum 1: over the central `size` x `size` that was looked at."""
    heat = jax.image.resize(heat, (len(heat), size, size), "linear")
    total = heat.sum((1, 2), keepdims=True)
    heat = heat / jnp.where(total > 0, total, 1)
    margin = (PATCH - size) // 2
    return jnp.pad(heat, [(0, 0), (margin, margin), (margin, margin)])
