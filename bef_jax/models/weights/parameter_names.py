"""The names that other packages give to the weights of networks that we share with them.

A `Source` translates our names, such as 'block_03/expand_conv/kernel' or 'stem_norm/mean', into the
names of its package. Every package uses torch's layouts, and torch's names for a layer's arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence

from bef_jax.models.weights import names_torchvision
from bef_jax.models.weights.names_torchvision import LEAVES


@dataclasses.dataclass(frozen=True)
class Source:
    """The names that a package gives to a family of networks, and how it computes with them.

    Attributes:
        sign: the name of a tensor that no other package has, so that it identifies this one.
        translate: maps (our name, the network's stages) to the package's name.
        padding, bn_epsilon, bn_momentum: fields of `config.model` that the weights were trained
            with.
    """

    name: str
    sign: str
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
    # No file has the signs of two sources, so the order of SOURCES does not matter.
    source = next((source for source in SOURCES if source.sign in keys), None)
    if source is TIMM and "tf_" in label:
        return dataclasses.replace(source, padding="same", bn_epsilon=1e-3)
    # Decide by the network's name, because epsilon and momentum change no name and no shape.
    if source is TORCHVISION and network in {f"efficientnet_b{i}" for i in (5, 6, 7)}:
        return dataclasses.replace(source, bn_epsilon=1e-3, bn_momentum=0.99)
    return source


# ---- EfficientNet -------------------------------------------------------------------------------


def _efficientnet_pytorch(path: str, stages: Sequence) -> str:
    """Translates for https://github.com/lukemelas/EfficientNet-PyTorch and its Lite version."""
    del stages
    layers = {
        "stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1",
        "classifier": "_fc", "expand_conv": "_expand_conv", "expand_norm": "_bn0",
        "depthwise_conv": "_depthwise_conv", "depthwise_norm": "_bn1",
        "squeeze_excite/reduce": "_se_reduce", "squeeze_excite/expand": "_se_expand",
        "project_conv": "_project_conv", "project_norm": "_bn2",
    }  # fmt: skip
    block, layer, leaf = _split(path)
    prefix = "" if block is None else f"_blocks.{block}."
    return f"{prefix}{layers[layer]}.{leaf}"


def _timm(path: str, stages: Sequence) -> str:
    """Translates for timm.

    A block without expansion calls its two norms bn1 and bn2, and its last convolution conv_pw.
    """
    layers = {
        "stem": "conv_stem", "stem_norm": "bn1", "head": "conv_head", "head_norm": "bn2",
        "classifier": "classifier", "depthwise_conv": "conv_dw",
        "squeeze_excite/reduce": "se.conv_reduce", "squeeze_excite/expand": "se.conv_expand",
    }  # fmt: skip
    expanded = {
        "expand_conv": "conv_pw", "expand_norm": "bn1", "depthwise_norm": "bn2",
        "project_conv": "conv_pwl", "project_norm": "bn3",
    }  # fmt: skip
    plain = {"depthwise_norm": "bn1", "project_conv": "conv_pw", "project_norm": "bn2"}
    block, layer, leaf = _split(path)
    if block is None:
        return f"{layers[layer]}.{leaf}"
    stage, index = _place(block, stages)
    layers |= plain if stages[stage].expand == 1 else expanded
    return f"blocks.{stage}.{index}.{layers[layer]}.{leaf}"


def _torchvision(path: str, stages: Sequence) -> str:
    """Translates for torchvision, which numbers every module.

    A block without expansion begins with the depthwise convolution.
    """
    block, layer, leaf = _split(path)
    last = len(stages) + 1
    ends = {
        "stem": "features.0.0", "stem_norm": "features.0.1", "head": f"features.{last}.0",
        "head_norm": f"features.{last}.1", "classifier": "classifier.1",
    }  # fmt: skip
    if block is None:
        return f"{ends[layer]}.{leaf}"
    # A part of a block is called by its number in the block, and has names for its own layers.
    layers = {
        "expand_conv": (0, "0"), "expand_norm": (0, "1"),
        "depthwise_conv": (1, "0"), "depthwise_norm": (1, "1"),
        "squeeze_excite/reduce": (2, "fc1"), "squeeze_excite/expand": (2, "fc2"),
        "project_conv": (3, "0"), "project_norm": (3, "1"),
    }  # fmt: skip
    stage, index = _place(block, stages)
    part, inner = layers[layer]
    if stages[stage].expand == 1:
        part -= 1
    return f"features.{stage + 1}.{index}.block.{part}.{inner}.{leaf}"


def _split(path: str) -> tuple[int | None, str, str]:
    """Turns 'block_03/squeeze_excite/reduce/kernel' into (3, 'squeeze_excite/reduce', 'weight')."""
    layer, _, leaf = path.rpartition("/")
    if not layer.startswith("block_"):
        return None, layer, LEAVES[leaf]
    block, _, layer = layer.partition("/")
    return int(block.removeprefix("block_")), layer, LEAVES[leaf]


def _place(block: int, stages: Sequence) -> tuple[int, int]:
    """Returns the stage of a block, and its place in the stage, both from 0."""
    for number, stage in enumerate(stages):
        if block < stage.repeats:
            return number, block
        block -= stage.repeats
    raise ValueError("the network has fewer blocks")


# Our momentum is the weight of the old value. torch's is that of the new: 0.01 and 0.1 for these.
_TENSORFLOW = {"padding": "same", "bn_epsilon": 1e-3, "bn_momentum": 0.99}
_TORCH = {"padding": "symmetric", "bn_epsilon": 1e-5, "bn_momentum": 0.9}
EFFICIENTNET_PYTORCH = Source(
    "efficientnet-pytorch", "_conv_stem.weight", _efficientnet_pytorch, **_TENSORFLOW
)
TIMM = Source("timm", "conv_stem.weight", _timm, **_TORCH)
TORCHVISION = Source("torchvision", "features.0.0.weight", _torchvision, **_TORCH)
# timm uses torchvision's names for these two networks.
RESNET = Source(
    "torchvision or timm",
    "layer1.0.conv1.weight",
    lambda path, _: names_torchvision.resnet(path),
    **_TORCH,
)
DENSENET = Source(
    "torchvision or timm",
    "features.denseblock1.denselayer1.norm1.weight",
    lambda path, _: names_torchvision.densenet(path),
    **_TORCH,
)
SOURCES = (EFFICIENTNET_PYTORCH, TIMM, TORCHVISION, RESNET, DENSENET)


def of_timm(network: str) -> Source | None:
    """Returns timm's source for the network `config.model.name`; None if timm lacks the network."""
    if network == "efficientnet_test":
        return None
    # timm has every other EfficientNet, under names of its own.
    return {"resnet50": RESNET, "densenet121": DENSENET}.get(network, TIMM)
