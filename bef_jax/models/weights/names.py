"""What other packages call the weights of the networks that they share with us.

A `Source` translates our names, 'block_03/expand_conv/kernel' or 'stem_norm/mean', into its own.
All of them keep torch's layouts and torch's names for what a layer holds.
"""

import dataclasses
from collections.abc import Callable, Sequence

from bef_jax.models.weights import names_torchvision

# torch calls a norm's scale a weight, too: a name tells which by its module.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A package's way of naming a family of networks, and of computing with them.

    Attributes:
        sign: a tensor that it alone has, to recognise it by.
        translate: (our name, the network's stages) -> its name.
        padding, bn_epsilon, bn_momentum: of `config.model`, with which the weights were trained.
    """

    name: str
    sign: str
    translate: Callable[[str, Sequence], str]
    padding: str
    bn_epsilon: float
    bn_momentum: float


def recognise(keys: Sequence[str], label: str, network: str) -> Source | None:
    """The source whose names these are, or None.

    timm's names are the same for TensorFlow's networks, of another padding, as for its own: only
    what it calls the network tells, `label`, which starts with `tf_`. torchvision trained B5 to B7
    with TensorFlow's epsilon.
    """
    # Their signs exclude each other, so the order of SOURCES says nothing.
    source = next((source for source in SOURCES if source.sign in keys), None)
    if source is TIMM and "tf_" in label:
        return dataclasses.replace(source, padding="same", bn_epsilon=1e-3)
    # Not to be seen in the file: shapes are those of the other epsilon's as well.
    if source is TORCHVISION and network in {f"efficientnet_b{i}" for i in (5, 6, 7)}:
        return dataclasses.replace(source, bn_epsilon=1e-3, bn_momentum=0.99)
    return source


# ---- EfficientNet -------------------------------------------------------------------------------


def _efficientnet_pytorch(path: str, stages: Sequence) -> str:
    """https://github.com/lukemelas/EfficientNet-PyTorch, and its Lite sibling."""
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
    """A block without expansion has its two norms counted from 1, and calls its last conv_pw."""
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
    """Everything is counted; without expansion a block begins with the depthwise convolution."""
    block, layer, leaf = _split(path)
    last = len(stages) + 1
    ends = {
        "stem": "features.0.0", "stem_norm": "features.0.1", "head": f"features.{last}.0",
        "head_norm": f"features.{last}.1", "classifier": "classifier.1",
    }  # fmt: skip
    if block is None:
        return f"{ends[layer]}.{leaf}"
    stage, index = _place(block, stages)
    parts = ["expand", "depthwise", "squeeze_excite", "project"]
    parts = parts[1:] if stages[stage].expand == 1 else parts
    # Paths end in the role, 'squeeze_excite/reduce' or 'expand_norm': the module's own number is
    # the part's place, and 0, 1, fc1 or fc2 what the role is called in it.
    part, _, role = layer.replace("/", "_").rpartition("_")
    inner = {"conv": "0", "norm": "1", "reduce": "fc1", "expand": "fc2"}[role]
    return f"features.{stage + 1}.{index}.block.{parts.index(part)}.{inner}.{leaf}"


def _split(path: str) -> tuple[int | None, str, str]:
    """'block_03/squeeze_excite/reduce/kernel' -> (3, 'squeeze_excite/reduce', 'weight')."""
    layer, _, leaf = path.rpartition("/")
    if not layer.startswith("block_"):
        return None, layer, _LEAVES[leaf]
    block, _, layer = layer.partition("/")
    return int(block.removeprefix("block_")), layer, _LEAVES[leaf]


def _place(block: int, stages: Sequence) -> tuple[int, int]:
    """The stage of a block, and its place there, both from 0."""
    for number, stage in enumerate(stages):
        if block < stage.repeats:
            return number, block
        block -= stage.repeats
    raise ValueError("the network has fewer blocks")


# torch's momentum is the share of the new, 0.01 and 0.1; these are the share that is kept.
_TENSORFLOW = {"padding": "same", "bn_epsilon": 1e-3, "bn_momentum": 0.99}
_TORCH = {"padding": "symmetric", "bn_epsilon": 1e-5, "bn_momentum": 0.9}
EFFICIENTNET_PYTORCH = Source(
    "efficientnet-pytorch", "_conv_stem.weight", _efficientnet_pytorch, **_TENSORFLOW
)
TIMM = Source("timm", "conv_stem.weight", _timm, **_TORCH)
TORCHVISION = Source("torchvision", "features.0.0.weight", _torchvision, **_TORCH)
# timm has torchvision's names for these two.
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
    """The source with timm's names for the network `config.model.name`; None if it has none."""
    if network == "efficientnet_test":
        return None
    # All EfficientNets but the test's are timm's too, under its own names.
    return {"resnet50": RESNET, "densenet121": DENSENET}.get(network, TIMM)
