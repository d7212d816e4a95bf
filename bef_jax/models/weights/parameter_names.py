"""The names that other packages give to the weights of networks that we share with them.

A `Source` translates our names, which come without the collection: 'block_03/expand_conv/kernel' is
a parameter, 'stem_norm/mean' a statistic. Every package uses torch's layouts, and torch's names for
a layer's arrays. A name of something that the package lacks, such as attention, raises KeyError.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Source:
    """The names that packages give to a family of networks, and how they compute with them.

    Attributes:
        marker: the name of a tensor that no other source has, so that it identifies the source.
        translate: maps (our name, the network's stages) to the package's name.
        padding, bn_epsilon, bn_momentum: fields of `config.model` that the weights were trained
            with.
    """

    name: str
    marker: str
    translate: Callable[[str, Sequence], str]
    padding: str
    bn_epsilon: float
    bn_momentum: float


def recognise(keys: Sequence[str], label: str, network: str) -> Source | None:
    """Returns the source that uses these names, or None.

    timm uses the same names for its own networks and for TensorFlow's, which have another padding
    and epsilon. Only `label` tells them apart: it has `tf_` for TensorFlow's. It is timm's name of
    the network or, if that is not known, the name of the file. torchvision trained B5 to B7 with
    TensorFlow's epsilon and momentum.
    """
    # No file has the markers of two sources, so the order of SOURCES does not matter.
    source = next((source for source in SOURCES if source.marker in keys), None)
    if source is TIMM and "tf_" in label:
        return dataclasses.replace(source, padding="same", bn_epsilon=1e-3)
    # Decide by the network's name, because epsilon and momentum change no name and no shape.
    if source is TORCHVISION and network in {f"efficientnet_b{i}" for i in (5, 6, 7)}:
        return dataclasses.replace(source, bn_epsilon=1e-3, bn_momentum=0.99)
    return source


def of_timm(network: str) -> Source | None:
    """Returns timm's source for the network `config.model.name`; None if timm lacks the network."""
    if network == "efficientnet_test":
        return None
    # timm has every other EfficientNet, under names of its own.
    return {"resnet50": RESNET, "densenet121": DENSENET}.get(network, TIMM)


def densenet_key(key: str) -> str:
    """Returns a key of a DenseNet's file as torchvision's network names it.

    An older torchvision saved the ImageNet weights, with 'norm.1' instead of 'norm1'.
    """
    # The pattern leaves the keys of every other network as they are.
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


# ---- the parts of a name ------------------------------------------------------------------------

# torch also calls a norm's scale `weight`; the name of the module tells the two apart.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _split(path: str) -> tuple[str, str, str]:
    """Turns 'block_03/squeeze_excite/reduce/kernel' into its block, layer and leaf.

    These are ('block_03', 'squeeze_excite/reduce', 'weight'). The block of 'stem/kernel' is ''.
    """
    module, _, leaf = path.rpartition("/")
    *block, layer = module.split("/", 1)
    return "".join(block), layer, _LEAVES[leaf]


def _places(stages: Sequence) -> dict[str, tuple[int, int, int]]:
    """Returns {'block_00': (0, 0, 0), ...}: each block's number, stage, and place in the stage."""
    # We number blocks through the whole network; most packages start again in each stage.
    places = [(stage, i) for stage, shape in enumerate(stages) for i in range(shape.repeats)]
    return {f"block_{number:02d}": (number, *place) for number, place in enumerate(places)}


# ---- EfficientNet -------------------------------------------------------------------------------

_EFFICIENTNET_PYTORCH_NAMES = {
    "stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1",
    "classifier": "_fc", "expand_conv": "_expand_conv", "expand_norm": "_bn0",
    "depthwise_conv": "_depthwise_conv", "depthwise_norm": "_bn1",
    "squeeze_excite/reduce": "_se_reduce", "squeeze_excite/expand": "_se_expand",
    "project_conv": "_project_conv", "project_norm": "_bn2",
}  # fmt: skip


def _efficientnet_pytorch(path: str, stages: Sequence) -> str:
    """Translates for https://github.com/lukemelas/EfficientNet-PyTorch and its Lite version."""
    block, layer, leaf = _split(path)
    prefix = f"_blocks.{_places(stages)[block][0]}." if block else ""
    return f"{prefix}{_EFFICIENTNET_PYTORCH_NAMES[layer]}.{leaf}"


_TIMM_NAMES = {
    "stem": "conv_stem", "stem_norm": "bn1", "head": "conv_head", "head_norm": "bn2",
    "classifier": "classifier", "expand_conv": "conv_pw", "expand_norm": "bn1",
    "depthwise_conv": "conv_dw", "depthwise_norm": "bn2",
    "squeeze_excite/reduce": "se.conv_reduce", "squeeze_excite/expand": "se.conv_expand",
    "project_conv": "conv_pwl", "project_norm": "bn3",
}  # fmt: skip
# A block without expansion calls its two norms bn1 and bn2, and its last convolution conv_pw.
_TIMM_UNEXPANDED = {"depthwise_norm": "bn1", "project_conv": "conv_pw", "project_norm": "bn2"}


def _timm(path: str, stages: Sequence) -> str:
    """Turns B0's 'block_03/project_conv/kernel' into 'blocks.2.0.conv_pwl.weight'."""
    block, layer, leaf = _split(path)
    if not block:
        return f"{_TIMM_NAMES[layer]}.{leaf}"
    _, stage, index = _places(stages)[block]
    names = _TIMM_NAMES | (_TIMM_UNEXPANDED if stages[stage].expand == 1 else {})
    return f"blocks.{stage}.{index}.{names[layer]}.{leaf}"


_TORCHVISION_ENDS = {
    "stem": "features.0.0", "stem_norm": "features.0.1", "head": "features.{head}.0",
    "head_norm": "features.{head}.1", "classifier": "classifier.1",
}  # fmt: skip
# torchvision numbers every module. A part of a block is called by its number in the block, and has
# names for its own layers.
_TORCHVISION_BLOCK = {
    "expand_conv": (0, "0"), "expand_norm": (0, "1"),
    "depthwise_conv": (1, "0"), "depthwise_norm": (1, "1"),
    "squeeze_excite/reduce": (2, "fc1"), "squeeze_excite/expand": (2, "fc2"),
    "project_conv": (3, "0"), "project_norm": (3, "1"),
}  # fmt: skip


def _torchvision(path: str, stages: Sequence) -> str:
    """Turns B0's 'block_03/project_conv/kernel' into 'features.3.0.block.3.0.weight'."""
    block, layer, leaf = _split(path)
    if not block:
        return f"{_TORCHVISION_ENDS[layer].format(head=len(stages) + 1)}.{leaf}"
    _, stage, index = _places(stages)[block]
    part, inner = _TORCHVISION_BLOCK[layer]
    # A block without expansion begins with the depthwise convolution.
    if stages[stage].expand == 1:
        part -= 1
    return f"features.{stage + 1}.{index}.block.{part}.{inner}.{leaf}"


# ---- ResNet and DenseNet ------------------------------------------------------------------------

# torch keeps a shortcut's two layers in a Sequential, so they are called 0 and 1.
_RESNET_NAMES = {
    "stem": "conv1", "stem_norm": "bn1", "classifier": "fc", "reduce_conv": "conv1",
    "reduce_norm": "bn1", "spatial_conv": "conv2", "spatial_norm": "bn2", "expand_conv": "conv3",
    "expand_norm": "bn3", "shortcut_conv": "downsample.0", "shortcut_norm": "downsample.1",
}  # fmt: skip


def _resnet(path: str, stages: Sequence) -> str:
    """Turns 'block_03/reduce_conv/kernel' into 'layer2.0.conv1.weight'."""
    block, layer, leaf = _split(path)
    if not block:
        return f"{_RESNET_NAMES[layer]}.{leaf}"
    _, stage, index = _places(stages)[block]
    return f"layer{stage + 1}.{index}.{_RESNET_NAMES[layer]}.{leaf}"


_DENSENET_NAMES = {
    "stem": "conv0", "stem_norm": "norm0", "head_norm": "norm5", "input_norm": "norm1",
    "bottleneck_conv": "conv1", "bottleneck_norm": "norm2", "growth_conv": "conv2",
}  # fmt: skip
_TRANSITION_NAMES = {"input_norm": "norm", "conv": "conv"}


def _densenet(path: str, stages: Sequence) -> str:
    """Turns 'transition_1/conv/kernel' into 'features.transition1.conv.weight'."""
    block, layer, leaf = _split(path)
    if layer == "classifier":
        return f"classifier.{leaf}"
    if not block:
        return f"features.{_DENSENET_NAMES[layer]}.{leaf}"
    if block.startswith("transition_"):
        return f"features.{block.replace('_', '')}.{_TRANSITION_NAMES[layer]}.{leaf}"
    _, stage, index = _places(stages)[block]
    # torchvision counts a DenseNet's layers from 1, but a ResNet's blocks from 0.
    place = f"denseblock{stage + 1}.denselayer{index + 1}"
    return f"features.{place}.{_DENSENET_NAMES[layer]}.{leaf}"


# ---- the sources --------------------------------------------------------------------------------

# Our momentum is the weight of the old value. torch's is that of the new: 0.01 and 0.1 for these.
_TENSORFLOW = {"padding": "same", "bn_epsilon": 1e-3, "bn_momentum": 0.99}
_TORCH = {"padding": "symmetric", "bn_epsilon": 1e-5, "bn_momentum": 0.9}
EFFICIENTNET_PYTORCH = Source(
    "efficientnet-pytorch", "_conv_stem.weight", _efficientnet_pytorch, **_TENSORFLOW
)
TIMM = Source("timm", "conv_stem.weight", _timm, **_TORCH)
TORCHVISION = Source("torchvision", "features.0.0.weight", _torchvision, **_TORCH)
# timm uses torchvision's names for these two networks.
RESNET = Source("torchvision or timm", "layer1.0.conv1.weight", _resnet, **_TORCH)
DENSENET = Source(
    "torchvision or timm", "features.denseblock1.denselayer1.norm1.weight", _densenet, **_TORCH
)
SOURCES = (EFFICIENTNET_PYTORCH, TIMM, TORCHVISION, RESNET, DENSENET)
