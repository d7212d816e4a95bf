"""Grad-CAM, compared with CAM on a linear head, where both agree, and with known properties."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from bef_jax.models import create
from bef_jax.runtime import sharding
from bef_jax.scoring import gradcam
from bef_jax.training.state import create_state


class Features(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3), use_bias=False)(x)


class LinearHead(nn.Module):
    """A convolution, mean pooling and a linear layer, so that Grad-CAM has a closed form."""

    classes: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        x = Features(name="block_00")(x)
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


@pytest.mark.parametrize(("called", "sign"), [(1, 1.0), (0, -1.0)])
def test_gradcam_of_a_linear_head_equals_cam(called, sign):
    """Grad-CAM is CAM (Zhou et al. 2016) divided by the number of positions."""
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    model = LinearHead()
    variables = model.init(jax.random.key(0), images)
    (found,) = gradcam.stage_maps(model, variables, images, jnp.full(3, called), ["block_00"])
    params = variables["params"]
    features = Features().apply({"params": params["block_00"]}, images)
    kernel = params["classifier"]["kernel"]
    weights = sign * (kernel[:, 1] - kernel[:, 0]) / 64  # 8 x 8 positions
    np.testing.assert_allclose(found, np.maximum(features @ weights, 0), atol=1e-7)


def test_gradcam_of_five_classes_is_of_the_called_class_against_the_others():
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype(np.float32)
    model = LinearHead(classes=5)
    variables = model.init(jax.random.key(0), images)
    called = np.array([3, 0, 4, 1, 2])
    (found,) = gradcam.stage_maps(model, variables, images, jnp.asarray(called), ["block_00"])
    params = variables["params"]
    features = Features().apply({"params": params["block_00"]}, images)
    logits, kernel = model.apply(variables, images), params["classifier"]["kernel"]
    for row, number in enumerate(called):
        # The log-odds fall with each other class by its share of the others' probability.
        others = np.delete(np.arange(5), number)
        shares = softmax(logits[row, others])
        weights = (kernel[:, number] - kernel[:, others] @ shares) / 64
        np.testing.assert_allclose(found[row], np.maximum(features[row] @ weights, 0), atol=1e-6)


@pytest.fixture(scope="module")
def patches():
    return np.random.default_rng(1).integers(0, 256, (11, 96, 96, 3), dtype=np.uint8)


def explainer(config):
    state = create_state(config, sharding.replicated(sharding.make_mesh()))
    return gradcam.make_explainer(config, state.eval_variables())


@pytest.mark.parametrize("attention", ["none", "cbam"])
def test_each_stage_adds_its_share_or_nothing_and_maps_are_0_outside_the_crop(
    attention, small_config, patches
):
    config = small_config(**{"model.attention": attention})
    maps = explainer(config)(patches, np.arange(11) % 2 == 0)
    assert maps.shape == (11, 96, 96) and (maps >= 0).all()
    # A map is the mean of four stages' maps, and each of them has a sum of 1 or is 0.
    stages = 4 * maps.sum((1, 2))
    np.testing.assert_allclose(stages, np.round(stages), atol=1e-3)
    assert 1 < stages.max() < 4.5
    margin = (96 - config.rcc.eval_size) // 2
    assert maps[:, :margin].sum() == maps[:, :, -margin:].sum() == 0


def test_a_map_does_not_depend_on_the_other_patches(small_config, patches):
    explain, called = explainer(small_config()), np.arange(11) % 3 == 0
    together = explain(patches, called)
    for row in (0, 8, 10):
        alone = explain(patches[row : row + 1], called[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "attention", "fusion", "expected"),
    [
        ("efficientnet_b3", "none", True, ["block_04", "block_07", "block_17", "block_25"]),
        ("efficientnet_b3", "cbam", True, [f"attention_{number}" for number in (2, 3, 5, 7)]),
        ("resnet50", "none", True, ["block_02", "block_06", "block_12", "block_15"]),
        ("efficientnet_b3", "none", False, ["block_25"]),
        ("efficientnet_b3", "cbam", False, ["attention_7"]),
    ],
)
def test_the_explained_stages_are_those_that_the_classifier_reads(
    name, attention, fusion, expected, small_config
):
    fields = {"model.name": name, "model.attention": attention, "model.fusion": fusion}
    config = small_config(**fields)
    assert gradcam.fused_outputs(create(config.model, folded=True)) == expected


@pytest.mark.parametrize(("side", "crop"), [(64, 48), (65, 33), (128, 128)])
def test_a_map_of_any_patch_lies_in_the_crop_that_the_network_saw(side, crop, small_config):
    fields = {"data.patch_size": side, "rcc.eval_size": crop, "rcc.center": 0}
    patches = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    maps = explainer(small_config(**fields))(patches, np.arange(3) % 2 == 0)
    assert maps.shape == (3, side, side)
    margin = (side - crop) // 2
    inside = maps[:, margin : side - margin, margin : side - margin]
    np.testing.assert_allclose(inside.sum(), maps.sum(), rtol=1e-6)
    # Each side of the crop is reached by one of the maps.
    ends = [inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1]]
    assert all(end.sum() > 0 for end in ends)


def test_without_cropping_a_map_covers_the_whole_patch(small_config, patches):
    maps = explainer(small_config(**{"rcc.enabled": False}))(patches, np.arange(11) % 2 == 0)
    rim = [maps[:, :20], maps[:, -20:], maps[:, :, :20], maps[:, :, -20:]]
    assert all(part.sum() > 0 for part in rim)
