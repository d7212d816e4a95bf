"""What torchvision calls the parameters and batch statistics of the networks that it shares.

The paths are ours without the collection, such as 'block_03/reduce_conv/kernel' of a parameter or
'stem_norm/mean' of a statistic. A path without a counterpart (attention) raises KeyError.
"""

import re
from collections.abc import Sequence

from bef_jax.models.densenet import DENSENET121
from bef_jax.models.resnet import RESNET50

# A norm's scale is a `weight` there as well; the module before it tells the two apart.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_RESNET = {"stem": "conv1", "stem_norm": "bn1", "classifier": "fc"}
# torch keeps a shortcut's two layers in a Sequential, hence 0 and 1.
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
    """ResNet-50: 'block_03/reduce_conv/kernel' -> 'layer2.0.conv1.weight'."""
    *scope, module, leaf = path.split("/")
    if not scope:
        return f"{_RESNET[module]}.{_LEAVES[leaf]}"
    stage, index = _places(RESNET50.stages)[scope[0]]
    return f"layer{stage}.{index}.{_BOTTLENECK[module]}.{_LEAVES[leaf]}"


def densenet(path: str) -> str:
    """DenseNet-121: 'transition_1/conv/kernel' -> 'features.transition1.conv.weight'."""
    *scope, module, leaf = path.split("/")
    if not scope:
        return f"{_DENSENET[module]}.{_LEAVES[leaf]}"
    if scope[0].startswith("transition_"):
        transition = scope[0].replace("_", "")
        return f"features.{transition}.{_TRANSITION[module]}.{_LEAVES[leaf]}"
    stage, index = _places(DENSENET121.stages)[scope[0]]
    # torchvision counts a DenseNet's layers from 1, a ResNet's blocks from 0.
    layer = f"features.denseblock{stage}.denselayer{index + 1}"
    return f"{layer}.{_DENSE_LAYER[module]}.{_LEAVES[leaf]}"


def densenet_key(key: str) -> str:
    """A key of a DenseNet's file as torchvision's network has it.

    The ImageNet weights were saved by an older torchvision, with 'norm.1' for 'norm1'.
    """
    # By the pattern, not by a list: it leaves every other network's keys as they are.
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


def _places(stages: Sequence) -> dict[str, tuple[int, int]]:
    """{'block_00': (1, 0), ...}: the stage, from 1, and the place in it, from 0, of every block."""
    # Ours are numbered through the whole network, torchvision's anew in each stage.
    places = [(number, i) for number, stage in enumerate(stages, 1) for i in range(stage.repeats)]
    return {f"block_{index:02d}": place for index, place in enumerate(places)}
