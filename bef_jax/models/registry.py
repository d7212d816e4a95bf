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

# The architecture must stay the first argument of each partial, where `stages` reads it.
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


def stages(name: str) -> tuple:
    """Returns a network's stages at total stride 32; `model.fusion_stages` counts them from 1."""
    return REGISTRY[name].args[0].stages


def create(
    model: ConfigDict, dtype: str = "float32", bn_groups: int = 1, folded: bool = False
) -> nn.Module:
    """Returns the network that `config.model` describes.

    `init(key, images, train)` gives {params, batch_stats}; `apply(variables, images, train)` gives
    logits [N, num_classes], float32, from normalised images [N, H, W, 3].

    Args:
        model: `config.model`; its fields except `name` are the network's attributes.
        dtype: of activations, float32 or bfloat16; parameters are float32.
        bn_groups: the number of parts of the batch that have their own batch statistics.
        folded: whether the convolutions include batch normalisation, as after
            `fold.fold_batch_norm`.
    """
    # Pass every field on: then Linen refuses one that the network does not have.
    fields = {key: value for key, value in model.items() if key != "name"}
    network = REGISTRY[model.name]
    return network(**fields, dtype=jnp.dtype(dtype), bn_groups=bn_groups, folded=folded)


def parameter_paths(model: ConfigDict) -> tuple[str, ...]:
    """Returns the paths of the network's parameters, in the order in which it uses them.

    A path looks like 'block_01/expand_conv/kernel'. Nothing is computed, but tracing a network
    takes a second or two.
    """
    # Layer-wise decay needs the order of use. Sorted by name, block_02 would come before stem, and
    # a transition of DenseNet's after all blocks.
    network, paths = create(model), []

    def init(key):
        # Collect inside the trace, because JAX sorts the dicts that leave it. Any image size works.
        params = network.init(key, jnp.zeros((1, 32, 32, 3)))["params"]
        paths.extend(flatten_dict(params, sep="/"))

    # The key has only a shape, too, because a real key would start the devices. Several processes
    # must connect before any of them starts its devices.
    jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))
    return tuple(paths)


def is_classifier(path: str) -> bool:
    """Returns whether a parameter is the classifier's; pretrained weights have other classes."""
    # Every network uses this name, and the prefix in `is_attention`. So no family needs a list.
    return path.split("/")[0] == "classifier"


def is_attention(path: str) -> bool:
    """Returns whether a parameter is attention's; the weights of other packages have none."""
    return path.startswith("attention_")


def is_frozen(path: str, pattern: str) -> bool:
    """Returns whether config.optim.freeze = `pattern` matches the start of a parameter's path."""
    # Only the start counts, so that `stem` does not match the end of another name. An empty pattern
    # would match every path.
    return bool(pattern) and re.match(pattern, path) is not None
