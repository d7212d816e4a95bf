import pytest
from flax.traverse_util import flatten_dict

from bef_jax.models import REGISTRY, stages
from bef_jax.models.weights.parameter_names import (
    DENSENET,
    EFFICIENTNET_PYTORCH,
    RESNET,
    SOURCES,
    TIMM,
    TORCHVISION,
    densenet_key,
)
from tests.models.test_efficientnet import shapes_of

NETWORKS = {
    EFFICIENTNET_PYTORCH: "efficientnet_b0",
    TIMM: "efficientnet_b0",
    TORCHVISION: "efficientnet_b0",
    RESNET: "resnet50",
    DENSENET: "densenet121",
}


def name_of(source, path):
    return source.translate(path, stages(NETWORKS[source]))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.marker)
def test_every_tensor_has_a_name_of_its_own_and_one_is_the_marker(source):
    flat = flatten_dict(shapes_of(REGISTRY[NETWORKS[source]]()), sep="/")
    names = [name_of(source, path.partition("/")[2]) for path in flat]
    assert len({*names}) == len(names)
    assert source.marker in names


@pytest.mark.parametrize(
    ("source", "path", "key"),
    [
        (EFFICIENTNET_PYTORCH, "stem/kernel", "_conv_stem.weight"),
        (EFFICIENTNET_PYTORCH, "block_03/project_conv/kernel", "_blocks.3._project_conv.weight"),
        (EFFICIENTNET_PYTORCH, "block_15/squeeze_excite/reduce/bias", "_blocks.15._se_reduce.bias"),
        (TIMM, "head_norm/var", "bn2.running_var"),
        (TIMM, "block_00/depthwise_norm/scale", "blocks.0.0.bn1.weight"),
        (TIMM, "block_00/project_conv/kernel", "blocks.0.0.conv_pw.weight"),
        (TIMM, "block_03/project_conv/kernel", "blocks.2.0.conv_pwl.weight"),
        (TIMM, "block_04/depthwise_norm/mean", "blocks.2.1.bn2.running_mean"),
        (TORCHVISION, "head/kernel", "features.8.0.weight"),
        (TORCHVISION, "block_00/project_norm/bias", "features.1.0.block.2.1.bias"),
        (TORCHVISION, "block_03/project_conv/kernel", "features.3.0.block.3.0.weight"),
        (TORCHVISION, "block_15/squeeze_excite/expand/bias", "features.7.0.block.2.fc2.bias"),
        (RESNET, "stem/kernel", "conv1.weight"),
        (RESNET, "stem_norm/mean", "bn1.running_mean"),
        (RESNET, "block_02/expand_norm/scale", "layer1.2.bn3.weight"),
        (RESNET, "block_03/reduce_conv/kernel", "layer2.0.conv1.weight"),
        (RESNET, "block_13/shortcut_conv/kernel", "layer4.0.downsample.0.weight"),
        (RESNET, "block_15/shortcut_norm/var", "layer4.2.downsample.1.running_var"),
        (RESNET, "classifier/bias", "fc.bias"),
        (DENSENET, "stem/kernel", "features.conv0.weight"),
        (DENSENET, "block_00/input_norm/bias", "features.denseblock1.denselayer1.norm1.bias"),
        (DENSENET, "block_57/growth_conv/kernel",
         "features.denseblock4.denselayer16.conv2.weight"),
        (DENSENET, "transition_3/input_norm/var", "features.transition3.norm.running_var"),
        (DENSENET, "head_norm/scale", "features.norm5.weight"),
        (DENSENET, "classifier/kernel", "classifier.weight"),
    ],
)  # fmt: skip
def test_names(source, path, key):
    assert name_of(source, path) == key


@pytest.mark.parametrize("path", ["attention_2/channel/Dense_0/kernel", "block_99/stem/kernel"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.marker)
def test_what_a_package_lacks_has_no_name(source, path):
    with pytest.raises(KeyError):
        name_of(source, path)


@pytest.mark.parametrize(
    ("saved", "key"),
    [
        ("features.denseblock1.denselayer2.norm.1.bias", "denseblock1.denselayer2.norm1.bias"),
        ("features.denseblock1.denselayer2.conv2.weight", "denseblock1.denselayer2.conv2.weight"),
        ("features.transition1.norm.weight", "transition1.norm.weight"),
    ],
)
def test_densenet_keys_of_old_files(saved, key):
    assert densenet_key(saved) == f"features.{key}"
