"""Tests of every family of networks, each with one or two blocks per stage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bef_jax.models import densenet, resnet
from bef_jax.models.densenet import DenseNet
from bef_jax.models.efficientnet import TEST, EfficientNet
from bef_jax.models.fold import fold_batch_norm
from bef_jax.models.resnet import ResNet
from tests.models.test_efficientnet import (
    BOOSTS,
    STILL,
    evaluate,
    make_images,
    make_variables,
    shapes_of,
    train,
)

EPSILON = 1e-3  # Network's default
RESNET = resnet.Architecture(8, tuple(resnet.Stage(16 * i, 1 + (i == 1)) for i in (1, 2, 3, 4)))
DENSENET = densenet.Architecture(8, 4, tuple(densenet.Stage(repeats) for repeats in (2, 1, 2, 1)))
FAMILIES = {
    "resnet": functools.partial(ResNet, RESNET, num_classes=2),
    "densenet": functools.partial(DenseNet, DENSENET, num_classes=2),
}
LAST = {"resnet": "block_04", "densenet": "head_norm"}

every_family = pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)


@pytest.mark.parametrize(
    ("pixels", "total_stride", "side"), [(64, 32, 2), (96, 32, 3), (96, 16, 6), (96, 8, 12)]
)
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("family", FAMILIES)
def test_total_stride_decides_the_last_map(family, padding, pixels, total_stride, side):
    network = FAMILIES[family](total_stride=total_stride, padding=padding)

    def last(variables):
        _, captured = network.apply(
            variables,
            jnp.zeros((1, pixels, pixels, 3)),
            capture_intermediates=lambda module, _: module.name == LAST[family],
            mutable=["intermediates"],
        )
        return captured["intermediates"][LAST[family]]["__call__"][0]

    assert jax.eval_shape(last, shapes_of(network, pixels)).shape[1:3] == (side, side)


def loss_of(network, variables, images):
    """Returns a function of params: the mean squared logit, and (logits, batch_stats)."""

    def loss(params):
        logits, batch_stats = train(network, variables | {"params": params}, images)
        return jnp.mean(jnp.square(logits)), (logits, batch_stats)

    return loss


@pytest.mark.parametrize("family", [*FAMILIES, "efficientnet"])
def test_remat_keeps_less_and_changes_nothing(family):
    """Has dropout and drop path on, because the second computation must draw the same numbers."""
    make = FAMILIES.get(family) or functools.partial(EfficientNet, TEST, num_classes=2)
    variables, images = make_variables(make()), make_images(8, 64)
    losses = [loss_of(make(remat=remat), variables, images) for remat in ("none", "block")]
    plain, again = (jax.jit(jax.grad(f, has_aux=True))(variables["params"]) for f in losses)
    # A bias before a norm has gradient 0, except for rounding.
    atol = 1e-5 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    for a, b in zip(*map(jax.tree.leaves, (plain, again)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=atol)
    # The pullback is a pytree of the arrays that the gradient keeps of the forward pass.
    kept = [
        jax.eval_shape(lambda params, f=f: jax.vjp(f, params, has_aux=True)[1], variables["params"])
        for f in losses
    ]
    all_of_it, inputs = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in kept)
    assert inputs < 0.6 * all_of_it


@every_family
@pytest.mark.parametrize(
    ("pixels", "fields"),
    [(64, {}), (96, {"padding": "symmetric"}), (64, BOOSTS), (96, {"total_stride": 16})],
)
def test_output_is_finite_and_depends_on_the_image(build, pixels, fields):
    network = build(**fields)
    logits = evaluate(network, make_variables(network), make_images(4, pixels))
    assert logits.shape == (4, 2)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert np.std(logits, axis=0).min() > 1e-3  # rounding makes 1e-6


@every_family
def test_every_parameter_has_a_gradient(build):
    network = build(**BOOSTS)
    variables, images = make_variables(network), make_images(8)

    def loss(params):
        logits, _ = train(network, variables | {"params": params}, images)
        return jnp.square(logits - 1).sum()

    gradients = flatten_dict(jax.jit(jax.grad(loss))(variables["params"]), sep="/")
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert [name for name, g in gradients.items() if not np.any(g)] == []


@every_family
@pytest.mark.parametrize("fields", [{}, BOOSTS])
def test_folded_network_equals_the_unfolded_one(build, fields):
    # The statistics are those of the images themselves, so that no layer's output explodes.
    fields = fields | STILL | {"bn_momentum": 0.0}
    network, folded = build(**fields), build(**fields, folded=True)
    variables, images = make_variables(network), make_images(16, 64)
    variables["batch_stats"] = train(network, variables, images)[1]
    expected = evaluate(network, variables, images)
    actual = evaluate(folded, fold_batch_norm(variables, EPSILON), images)
    # The logits are compared as vectors, because a single one of 32 may be off by more rounding.
    assert np.linalg.norm(actual - expected) < 1e-5 * np.linalg.norm(expected)


@every_family
def test_folded_variables_are_what_the_folded_network_takes(build):
    folded = fold_batch_norm(make_variables(build()), EPSILON)
    wanted = shapes_of(build(folded=True))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, wanted)


@every_family
def test_bfloat16_is_near_float32(build):
    networks = [build(dtype=dtype, **STILL) for dtype in (jnp.float32, jnp.bfloat16)]
    variables, images = make_variables(networks[0]), make_images(8, 64)
    exact, rough = (evaluate(network, variables, images) for network in networks)
    assert rough.dtype == jnp.float32
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(rough, exact, atol=3e-2 * np.abs(exact).max())


@every_family
def test_bn_groups_are_batches_of_their_own(build):
    images = make_images(8, 64) * np.repeat(np.float32([1, 3]), 4)[:, None, None, None]
    alone, grouped = build(**STILL), build(bn_groups=2, **STILL)
    variables = make_variables(alone)
    logits, _ = train(grouped, variables, images)
    parts = [train(alone, variables, part)[0] for part in np.split(images, 2)]
    np.testing.assert_allclose(logits, np.concatenate(parts), rtol=1e-3, atol=1e-3)
