import pytest
from flax.traverse_util import flatten_dict

from bef_jax.models import REGISTRY
from bef_jax.models.weights.names_torchvision import densenet, densenet_key, resnet
from tests.models.test_efficientnet import shapes_of

NAMES = {"resnet50": resnet, "densenet121": densenet}


def paths_of(network):
    """Returns the path of every parameter and statistic, without the collection."""
    flat = flatten_dict(shapes_of(REGISTRY[network]()), sep="/")
    return [path.split("/", 1)[1] for path in flat]


@pytest.mark.parametrize("network", NAMES)
def test_every_tensor_has_a_name_of_its_own(network):
    paths = paths_of(network)
    assert len({NAMES[network](path) for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("name", "path", "key"),
    [
        (resnet, "stem/kernel", "conv1.weight"),
        (resnet, "stem_norm/mean", "bn1.running_mean"),
        (resnet, "block_02/expand_norm/scale", "layer1.2.bn3.weight"),
        (resnet, "block_03/reduce_conv/kernel", "layer2.0.conv1.weight"),
        (resnet, "block_13/shortcut_conv/kernel", "layer4.0.downsample.0.weight"),
        (resnet, "block_15/shortcut_norm/var", "layer4.2.downsample.1.running_var"),
        (resnet, "classifier/bias", "fc.bias"),
        (densenet, "stem/kernel", "features.conv0.weight"),
        (densenet, "block_00/input_norm/bias", "features.denseblock1.denselayer1.norm1.bias"),
        (densenet, "block_57/growth_conv/kernel", "features.denseblock4.denselayer16.conv2.weight"),
        (densenet, "transition_3/input_norm/var", "features.transition3.norm.running_var"),
        (densenet, "head_norm/scale", "features.norm5.weight"),
        (densenet, "classifier/kernel", "classifier.weight"),
    ],
)
def test_names(name, path, key):
    assert name(path) == key


@pytest.mark.parametrize("name", [resnet, densenet])
def test_what_torchvision_lacks_has_no_name(name):
    with pytest.raises(KeyError):
        name("attention_2/channel/Dense_0/kernel")


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
