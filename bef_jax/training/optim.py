"""Optimisers, the learning-rate schedule, and what fine-tuning slows or freezes."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from bef_jax.models import is_attention, is_classifier, is_frozen, parameter_paths

# Decide by name, because a rule by rank would silently decide about a new kind of parameter.
_DECAYED = {"kernel": True, "bias": False, "scale": False}


def decay_mask(params) -> dict:
    """Returns which parameters weight decay shrinks: kernels, not biases or batch normalisation.

    Raises:
        ValueError: a parameter has a name that this rule does not know; so none is overlooked.
    """

    def decayed(path, _) -> bool:
        name = path[-1].key
        if name not in _DECAYED:
            raise ValueError(f"weight decay is undecided for {jax.tree_util.keystr(path)}")
        return _DECAYED[name]

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_schedule(config: ConfigDict, steps: int, steps_per_epoch: int) -> Callable:
    """Returns the rate as a function of the step: linear warm-up to the peak, then half a cosine.

    The peak is optim.learning_rate * batch_size / 256 (Goyal et al. 2017).
    """
    peak = config.optim.learning_rate * config.batch_size / 256
    # optax includes the warm-up in the schedule's length, and refuses a cosine of 0 steps.
    warmup = min(round(config.optim.warmup_epochs * steps_per_epoch), steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, steps, peak * config.optim.final_fraction
    )


def learning_rates(schedule: Callable, start: int, sizes: Iterable[int]) -> Iterator[Array]:
    """Yields the rates of the steps of each call, float32 [size], from step `start` on.

    They are arguments of the training step, and no part of its program. So another schedule, which
    differs with the number of steps, costs no minutes of compiling.

    Args:
        schedule: from `make_schedule`.
        sizes: how many steps each call takes.
    """
    # Compiled, because single operations give rates that differ in the last bit. The small program
    # costs a tenth of a second.
    rates = jax.jit(schedule)
    for size in sizes:
        yield rates(np.arange(start, start + size, dtype=np.int32))
        start += size


def make_optimizer(config: ConfigDict, schedule: Callable) -> optax.GradientTransformation:
    """Returns clipping, then adamw, rmsprop or sgd, then the factors of fine-tuning.

    Layer-wise decay and head_only_steps multiply the finished update, so moments and momentum are
    gathered as without them. Parameters frozen by optim.freeze have no moments, and their gradient
    does not count for clipping.
    """
    # The factors come last, so that they scale the whole update, with weight decay and momentum.
    tx = optax.chain(*_base_optimizer(config.optim, schedule), *_fine_tuning(config))
    if not config.optim.freeze:
        return tx
    # Do not use optax.masked, which would apply the gradient of frozen parameters as their update.
    transforms = {"trained": tx, "frozen": optax.set_to_zero()}
    return optax.partition(transforms, functools.partial(_freeze_labels, config.optim.freeze))


def _base_optimizer(optim: ConfigDict, schedule: Callable) -> list[optax.GradientTransformation]:
    """Returns clipping and the optimiser that `optim.name` names.

    AdamW's weight decay is decoupled (Loshchilov & Hutter 2019); the others add weight_decay *
    kernel to the gradient. RMSprop averages with the EfficientNet paper's 0.9, and epsilon is 1e-3.
    """
    # Clip before the optimiser, because an outlier would stay in its moments for many steps.
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    if optim.name == "adamw":
        decay = {"weight_decay": optim.weight_decay, "mask": decay_mask}
        return [clip, optax.adamw(schedule, **decay)]
    decay = optax.add_decayed_weights(optim.weight_decay, mask=decay_mask)
    # Replace 0 by None, because optax would keep a useless trace as large as the parameters.
    momentum = optim.momentum or None
    if optim.name == "rmsprop":
        # Epsilon is inside the root, as in TensorFlow. TensorFlow's moments begin at 1, optax's at
        # 0, so the first steps are larger here. This is one more reason for a warm-up.
        tx = optax.rmsprop(schedule, decay=0.9, eps=1e-3, momentum=momentum)
    else:
        tx = optax.sgd(schedule, momentum=momentum)
    return [clip, decay, tx]


# ---- fine-tuning --------------------------------------------------------------------------------


def _fine_tuning(config: ConfigDict) -> list[optax.GradientTransformation]:
    optim, transforms = config.optim, []
    if optim.layer_decay != 1:
        transforms.append(optax.stateless(functools.partial(_scale_by_layer, config)))
    if optim.head_only_steps:
        # The head here is the classifier and attention, not the networks' layer `head`. The factor
        # of all other parameters is 0 and later 1, so that one compiled step serves both phases.
        gate = optax.scale_by_schedule(lambda count: count >= optim.head_only_steps)
        transforms.append(optax.masked(gate, _pretrained_mask))
    return transforms


def _scale_by_layer(config: ConfigDict, updates, params=None):
    del params
    # These are constants of the program, computed once while it is traced.
    scales = layer_multipliers(parameter_paths(config.model), config.optim.layer_decay)
    return _map_named(lambda name, update: scales[name] * update, updates)


def layer_multipliers(paths: Sequence[str], decay: float) -> dict[str, float]:
    """Returns a factor of the learning rate per parameter (layer-wise decay; BEiT, ELECTRA).

    The classifier and attention have 1, the layer before the classifier has `decay`, the one before
    that decay^2, and so on down to the stem. A layer is a top-level module together with its batch
    normalisation.

    Args:
        paths: the parameters in the order in which the network uses them
            (`models.parameter_paths`). The order gives their depth, for any names of modules.
    """
    # Use a dict, because it keeps the order of first use, and a set does not.
    layers = list(dict.fromkeys(_layer(path) for path in paths if _is_pretrained(path)))
    depth = {layer: len(layers) - i for i, layer in enumerate(layers)}
    # The classifier and attention have no depth here, so their factor is decay^0.
    return {path: decay ** depth.get(_layer(path), 0) for path in paths}


def _layer(path: str) -> str:
    return path.split("/")[0].removesuffix("_norm")


def _pretrained_mask(tree):
    return _map_named(lambda name, _: _is_pretrained(name), tree)


def _is_pretrained(path: str) -> bool:
    return not (is_classifier(path) or is_attention(path))


def stop_frozen(params, pattern: str):
    """Stops the gradient of frozen parameters, so that no backward pass is spent on it."""
    if not pattern:
        return params
    # With optax alone, the gradient would be computed first and its update dropped later.
    stop = jax.lax.stop_gradient
    return _map_named(lambda name, x: stop(x) if is_frozen(name, pattern) else x, params)


def _freeze_labels(pattern: str, params):
    return _map_named(lambda name, _: "frozen" if is_frozen(name, pattern) else "trained", params)


def _map_named(function: Callable, tree):
    """Applies `function(name, leaf)`, with names like 'block_01/expand_conv/kernel'."""

    def named(path, leaf):
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(named, tree)
