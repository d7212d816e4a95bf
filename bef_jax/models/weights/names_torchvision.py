"""torchvision's names for parameters and batch statistics of the networks that we share with it.

Our paths come without the collection: 'block_03/reduce_conv/kernel' is a parameter, and
'stem_norm/mean' a statistic. A path that torchvision lacks (attention) raises KeyError.
"""

import re
from collections.abc import Sequence

from bef_jax.models.densenet import DENSENET121
from bef_jax.models.resnet import RESNET50

# torch also calls a norm's scale `weight`; the name of the module tells the two apart.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_RESNET = {"stem": "conv1", "stem_norm": "bn1", "classifier": "fc"}
# torch keeps a shortcut's two layers in a Sequential, so they are called 0 and 1.
_BOTTLENECK = {
    "reduce_conv": "conv1",
    "reduce_norm": "bn1",
    "spatial_conv": "conv2",
    "spatial_norm": "bn2",
    "expand_conv": "conv3",
    "expand_norm": "bn3",
    "shortcut_conv": "downsample.0",
    "shortcut_norm": "downsample.1",
}
_DENSENET = {
    "stem": "features.conv0",
    "stem_norm": "features.norm0",
    "head_norm": "features.norm5",
    "classifier": "classifier",
}
_DENSE_LAYER = {
    "input_norm": "norm1",
    "bottleneck_conv": "conv1",
    "bottleneck_norm": "norm2",
    "growth_conv": "conv2",
}
_TRANSITION = {"input_norm": "norm", "conv": "conv"}


def resnet(path: str) -> str:
    """Turns 'block_03/reduce_conv/kernel' into 'layer2.0.conv1.weight' (ResNet-50)."""
    *scope, module, leaf = path.split("/")
    if not scope:
        return f"{_RESNET[module]}.{LEAVES[leaf]}"
    stage, index = _places(RESNET50.stages)[scope[0]]
    return f"layer{stage}.{index}.{_BOTTLENECK[module]}.{LEAVES[leaf]}"


def densenet(path: str) -> str:
    """Turns 'transition_1/conv/kernel' into 'features.transition1.conv.weight' (DenseNet-121)."""
    *scope, module, leaf = path.split("/")
    if not scope:
        return f"{_DENSENET[module]}.{LEAVES[leaf]}"
    if scope[0].startswith("transition_"):
        transition = scope[0].replace("_", "")
        return f"features.{transition}.{_TRANSITION[module]}.{LEAVES[leaf]}"
    stage, index = _places(DENSENET121.stages)[scope[0]]
    # torchvision counts a DenseNet's layers from 1, but a ResNet's blocks from 0.
    layer = f"features.denseblock{stage}.denselayer{index + 1}"
    return f"{layer}.{_DENSE_LAYER[module]}.{LEAVES[leaf]}"


def densenet_key(key: str) -> str:
    """Returns a key of a DenseNet's file as torchvision's network names it.

    An older torchvision saved the ImageNet weights, with 'norm.1' instead of 'norm1'.
    """
    # The pattern leaves the keys of every other network as they are.
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


def _places(stages: Sequence) -> dict[str, tuple[int, int]]:
    """Returns {'block_00': (1, 0), ...}: each block's stage, from 1, and place in it, from 0."""
    # We number blocks through the whole network; torchvision starts again in each stage.
    places = [(number, i) for number, stage in enumerate(stages, 1) for i in range(stage.repeats)]
    return {f"block_{index:02d}": place for index, place in enumerate(places)}
