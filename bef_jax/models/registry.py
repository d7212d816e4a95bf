"""The networks, by name."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from bef_jax.models.densenet import DENSENET121, DenseNet
from bef_jax.models.efficientnet import LITE_SCALING, SCALING, TEST, EfficientNet, lite, scaled
from bef_jax.models.resnet import RESNET50, ResNet

# `num_stages`, and the names of other packages' weights, read a partial's `args[0]`: the
# architecture stays its first argument.
REGISTRY = {
    "efficientnet_test": functools.partial(EfficientNet, TEST),
    **{
        f"efficientnet_{variant}": functools.partial(EfficientNet, scaled(variant))
        for variant in SCALING
    },
    **{
        f"efficientnet_{variant}": functools.partial(EfficientNet, lite(variant))
        for variant in LITE_SCALING
    },
    "resnet50": functools.partial(ResNet, RESNET50),
    "densenet121": functools.partial(DenseNet, DENSENET121),
}


def num_stages(name: str) -> int:
    """How many stages the network of that name has; `model.fusion_stages` counts them from 1."""
    return len(REGISTRY[name].args[0].stages)


def create(
    model: ConfigDict, dtype: str = "float32", bn_groups: int = 1, folded: bool = False
) -> nn.Module:
    """Returns the network that `config.model` describes.

    `init(key, images, train)` gives {params, batch_stats}; `apply(variables, images, train)` gives
    logits [N, num_classes], float32, from normalised images [N, H, W, 3].

    Args:
        model: `config.model`; its fields beside `name` are the network's attributes.
        dtype: of activations, float32 or bfloat16; parameters are float32.
        bn_groups: parts of the batch with batch statistics of their own.
        folded: batch normalisation in the convolutions, as `fold.fold_batch_norm` puts it there.
    """
    # Linen refuses what is no attribute, so that a field of `config.model` can't be forgotten by a
    # family of networks in silence.
    fields = {key: value for key, value in model.items() if key != "name"}
    network = REGISTRY[model.name]
    return network(**fields, dtype=jnp.dtype(dtype), bn_groups=bn_groups, folded=folded)


def parameter_paths(model: ConfigDict) -> tuple[str, ...]:
    """The network's parameters, as 'block_00/expand_conv/kernel', in the order it uses them.

    Nothing is computed, but tracing a network takes a second or two.
    """
    # The order of use is what layer-wise decay goes by: by name, block_02 would come before stem,
    # and a transition of DenseNet's behind all blocks.
    network, paths = create(model), []

    def init(key):
        # Within the trace, since JAX sorts the dicts that leave one; any image will do.
        params = network.init(key, jnp.zeros((1, 32, 32, 3)))["params"]
        paths.extend(flatten_dict(params, sep="/"))

    # Of the key, too, the shape alone: a real one would start the devices, and several processes
    # have to meet before any of them does.
    jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))
    return tuple(paths)


def is_untrained_part(path: str) -> bool:
    """Whether a parameter is of a part that pretraining lacks: the classifier, or attention."""
    # By the top-level name alone: networks call these two alike, so that no family needs a list.
    part = path.split("/")[0]
    return part == "classifier" or part.startswith("attention_")


def is_frozen(path: str, pattern: str) -> bool:
    """Whether config.optim.freeze = `pattern` matches the start of a parameter's path."""
    # At the start, not anywhere: `stem` must not match the end of another name. Empty would match
    # all.
    return bool(pattern) and re.match(pattern, path) is not None
