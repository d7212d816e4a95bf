"""Optimisers and the learning-rate schedule."""

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

_DECAYED = {"kernel": True, "bias": False, "scale": False}


def decay_mask(params) -> dict:
    """Which parameters weight decay shrinks: kernels, not biases nor batch normalisation.

    Raises:
        ValueError: a parameter has a name that this rule does not know, so it covers them all.
    """

    def decayed(path, _) -> bool:
        name = path[-1].key
        if name not in _DECAYED:
            raise ValueError(f"weight decay is undecided for {jax.tree_util.keystr(path)}")
        return _DECAYED[name]

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_schedule(config: ConfigDict, steps: int, steps_per_epoch: int) -> Callable:
    """Linear warm-up to the peak, then half a cosine; a function of the step.

    The peak is optim.learning_rate * batch_size / 256 (Goyal et al. 2017).
    """
    peak = config.optim.learning_rate * config.batch_size / 256
    warmup = min(round(config.optim.warmup_epochs * steps_per_epoch), steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, steps, peak * config.optim.final_fraction
    )


def make_optimizer(config: ConfigDict, schedule: Callable) -> optax.GradientTransformation:
    """Clipping, then adamw, rmsprop or sgd.

    AdamW's decay is decoupled (Loshchilov & Hutter 2019); the others add weight_decay * kernel to
    the gradient. RMSprop has the EfficientNet paper's decay 0.9 and epsilon 1e-3.
    """
    optim = config.optim
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    if optim.name == "adamw":
        decay = {"weight_decay": optim.weight_decay, "mask": decay_mask}
        return optax.chain(clip, optax.adamw(schedule, **decay))
    decay = optax.add_decayed_weights(optim.weight_decay, mask=decay_mask)
    if optim.name == "rmsprop":
        tx = optax.rmsprop(schedule, decay=0.9, eps=1e-3, momentum=optim.momentum)
    else:
        tx = optax.sgd(schedule, momentum=optim.momentum or None)
    return optax.chain(clip, decay, tx)
