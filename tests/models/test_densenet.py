import flax.linen as nn
import jax
import numpy as np
import pytest

from bef_jax import models
from bef_jax.configs import densenet121
from bef_jax.models.densenet import DENSENET121, DenseNet, Transition
from bef_jax.models.fold import fold_batch_norm
from tests.models.test_efficientnet import count, make_images, make_variables, shapes_of
from tests.models.test_resnet import shapes_of_calls

PUBLISHED = 7_978_856


def test_parameter_count_is_the_published_one():
    model = densenet121.get_config("model.num_classes=1000").model
    assert count(models.create(model)) == PUBLISHED


def test_each_layer_adds_its_growth_and_each_transition_halves():
    shapes = shapes_of_calls(DenseNet(DENSENET121), 64)
    assert shapes["stem_norm"] == (1, 32, 32, 64)
    assert [shapes[f"block_{i:02d}"] for i in (0, 5)] == [(1, 16, 16, 96), (1, 16, 16, 256)]
    assert shapes["transition_1"] == (1, 8, 8, 128)
    assert shapes["transition_3"] == (1, 2, 2, 512)
    assert shapes["head_norm"] == (1, 2, 2, 1024)


def test_total_stride_8_takes_the_pool_of_the_last_transition_away():
    shapes = shapes_of_calls(DenseNet(DENSENET121, total_stride=8), 64)
    assert shapes["transition_2"] == (1, 8, 8, 256)
    assert shapes["transition_3"] == (1, 8, 8, 512)


@pytest.mark.parametrize("pixels", [8, 7])
def test_transition_equals_the_paper_s_order(pixels):
    # In the paper, the pool comes last, after norm, ReLU and convolution.
    norm = DenseNet(DENSENET121).make_norm(activation="relu")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, pixels, pixels, 6)).astype(np.float32)
    module = Transition(stride=2, input_norm=norm, dtype=np.float32)
    variables = module.init(jax.random.key(0), x, train=False)
    positive = np.maximum(x / np.sqrt(1 + 1e-3), 0)
    product = positive @ variables["params"]["conv"]["kernel"][0, 0]
    expected = nn.avg_pool(product, (2, 2), (2, 2))
    actual = module.apply(variables, x, train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_norms_before_their_convolution_stay_when_folded():
    variables = make_variables(DenseNet(DENSENET121))
    folded = fold_batch_norm(variables, 1e-3)
    assert folded["batch_stats"]["block_00"].keys() == {"input_norm"}
    assert folded["batch_stats"].keys() >= {"transition_1", "head_norm"}
    assert "stem_norm" not in folded["batch_stats"]
    block = folded["params"]["block_00"]
    assert block["input_norm"].keys() == {"scale", "bias"}
    assert block["bottleneck_norm"].keys() == {"bias"}


def test_a_folded_network_does_not_train():
    network = DenseNet(DENSENET121, folded=True)
    with pytest.raises(ValueError, match="folded"):
        jax.eval_shape(
            lambda variables: network.apply(variables, make_images(1), train=True),
            shapes_of(network),
        )
