import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bef_jax import models
from bef_jax.configs.default import get_config
from bef_jax.errors import UserError
from bef_jax.models.efficientnet import SCALING, round_channels, scaled
from bef_jax.models.layers import DropPath

PUBLISHED = {
    "b0": 5_288_548,
    "b1": 7_794_184,
    "b2": 9_109_994,
    "b3": 12_233_232,
    "b4": 19_341_616,
    "b5": 30_389_784,
    "b6": 43_040_704,
    "b7": 66_347_960,
    "lite0": 4_652_008,
    "lite1": 5_416_680,
    "lite2": 6_092_072,
    "lite3": 8_197_096,
    "lite4": 13_006_568,
}
BOOSTS = {"total_stride": 16, "attention": "cbam", "attention_reduction": 4, "fusion": True}
STILL = {"dropout": 0.0, "drop_path": 0.0}  # nothing random in training


def build(name, dtype="float32", bn_groups=1, folded=False, **fields):
    model = get_config().model
    model.update({"name": f"efficientnet_{name}", **fields})
    return models.create(model, dtype, bn_groups, folded)


def shapes_of(network, pixels=32):
    """Returns the shapes of the variables; nothing is compiled."""
    init = functools.partial(network.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)))


def count(network):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(network)["params"]))


def make_variables(network):
    """Makes random variables of the right shapes, without compiling `init`."""
    rng = np.random.default_rng(0)

    def value(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1] == "kernel":
            return noise * math.sqrt(2 / math.prod(leaf.shape[:-1]))
        if path[-1] == "var":  # small, because gates would otherwise leave little of the signal
            return 0.45 + 0.05 * np.abs(noise)
        return 0.1 * noise + (path[-1] == "scale")

    shapes = flatten_dict(shapes_of(network))
    return unflatten_dict({path: value(path, leaf) for path, leaf in shapes.items()})


def make_images(n, pixels=32):
    return np.random.default_rng(1).normal(size=(n, pixels, pixels, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(network, variables, images):
    return network.apply(variables, images)


@functools.partial(jax.jit, static_argnums=0)
def train(network, variables, images):
    """Returns the logits and batch statistics of a training pass."""
    rngs = {"dropout": jax.random.key(0)}
    logits, updates = network.apply(
        variables, images, train=True, mutable=["batch_stats"], rngs=rngs
    )
    return logits, updates["batch_stats"]


def parameter_shapes(**fields):
    shapes = flatten_dict(shapes_of(build("test", **fields))["params"], sep="/")
    return {name: leaf.shape for name, leaf in shapes.items()}


# ---- architecture -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameter_count_is_the_published_one(variant):
    assert count(build(variant, num_classes=1000)) == PUBLISHED[variant]


def test_registry_holds_the_scaled_networks_and_the_small_one():
    assert set(models.REGISTRY) >= {"efficientnet_test", *(f"efficientnet_{v}" for v in PUBLISHED)}
    assert count(build("test", **BOOSTS)) < 200_000


def test_parameters_are_float32_whatever_the_dtype():
    leaves = jax.tree.leaves(shapes_of(build("test", "bfloat16", **BOOSTS)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("channels", "rounded"), [(32, 32), (35.2, 32), (38.4, 40), (17.6, 16), (3, 8), (11, 16)]
)
def test_round_channels(channels, rounded):
    # 35.2, 38.4 and 17.6 are in B2 and B3. For 11, 8 is more than 10% below.
    assert round_channels(channels) == rounded


def test_blocks_per_stage_are_those_of_the_published_networks():
    repeats = {v: [stage.repeats for stage in scaled(v).stages] for v in SCALING}
    assert repeats["b0"] == [1, 2, 2, 3, 3, 4, 1]
    assert repeats["b3"] == [2, 3, 3, 5, 5, 6, 2]
    assert repeats["b7"] == [4, 7, 7, 10, 10, 13, 4]


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(("total_stride", "side"), [(32, 3), (16, 6), (8, 12)])
@pytest.mark.parametrize("name", ["test", "b0"])
def test_a_patch_of_96_pixels_ends_in(name, total_stride, side, padding):
    network = build(name, total_stride=total_stride, padding=padding)

    def head(variables):
        _, captured = network.apply(
            variables,
            jnp.zeros((1, 96, 96, 3)),
            capture_intermediates=lambda module, _: module.name == "head",
            mutable=["intermediates"],
        )
        return captured["intermediates"]["head"]["__call__"][0]

    width = {"test": 128, "b0": 1280}[name]
    assert jax.eval_shape(head, shapes_of(network, 96)).shape == (1, side, side, width)


def test_drop_path_grows_linearly_from_0_over_the_blocks():
    network, rates = build("b0", drop_path=0.32), {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, DropPath):
            rates[context.module.path[0]] = context.module.rate
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(network)
    # These are the blocks of 16 that keep their input's shape. The others have no residual to drop.
    residual = [2, 4, 6, 7, 9, 10, 12, 13, 14]
    assert rates == {f"block_{i:02d}": pytest.approx(0.32 * i / 16) for i in residual}


# ---- boosts, each alone -------------------------------------------------------------------------


@pytest.mark.parametrize("total_stride", [16, 8])
def test_reduced_downsampling_leaves_every_parameter_as_it_was(total_stride):
    assert parameter_shapes(total_stride=total_stride) == parameter_shapes(total_stride=32)


def test_attention_adds_a_cbam_to_each_fused_stage():
    plain, boosted = parameter_shapes(), parameter_shapes(attention="cbam", attention_reduction=8)
    added = {name: shape for name, shape in boosted.items() if plain.get(name) != shape}
    assert plain.items() < boosted.items()
    assert {name.split("/")[0] for name in added} == {f"attention_{i}" for i in (2, 3, 4, 5)}
    assert added["attention_3/channel/Dense_0/kernel"] == (32, 8)  # at least 8 units
    assert added["attention_3/channel/Dense_1/kernel"] == (8, 32)
    assert added["attention_3/spatial/Conv_0/kernel"] == (7, 7, 2, 1)


@pytest.mark.parametrize(("stages", "rows"), [((), 128 + 24 + 32 + 40 + 64), ((1, 3), 128 + 48)])
def test_fusion_widens_the_classifier_alone(stages, rows):
    plain, boosted = parameter_shapes(), parameter_shapes(fusion=True, fusion_stages=stages)
    assert plain.pop("classifier/kernel") == (128, 2)
    assert boosted.pop("classifier/kernel") == (rows, 2)
    assert plain == boosted


def test_boosted_b3_takes_attention_after_blocks_4_7_17_and_25():
    network, calls = build("b3", **BOOSTS), []

    def record(call, args, kwargs, context):
        if len(context.module.path) == 1 and context.method_name == "__call__":
            calls.append(context.module.name)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(network)
    before = {name: calls[i - 1] for i, name in enumerate(calls) if name.startswith("attention")}
    assert before == {
        "attention_2": "block_04",
        "attention_3": "block_07",
        "attention_5": "block_17",
        "attention_7": "block_25",
    }


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fields"), [("test", {}), ("test", BOOSTS), ("b0", {})])
def test_output_is_finite_and_depends_on_the_image(name, fields):
    network = build(name, **fields)
    logits = evaluate(network, make_variables(network), make_images(4))
    assert logits.shape == (4, 2)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert np.std(logits, axis=0).min() > 0.01


@pytest.mark.slow
def test_every_parameter_has_a_gradient():
    network = build("test", **BOOSTS)
    variables, images = make_variables(network), make_images(4)

    def loss(params):
        logits, _ = train(network, variables | {"params": params}, images)
        return jnp.square(logits - 1).sum()

    gradients = flatten_dict(jax.jit(jax.grad(loss))(variables["params"]), sep="/")
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert [name for name, g in gradients.items() if not np.any(g)] == []


def test_bfloat16_is_near_float32():
    networks = [build("test", dtype, **BOOSTS) for dtype in ("float32", "bfloat16")]
    variables, images = make_variables(networks[0]), make_images(4)
    exact, rough = (evaluate(network, variables, images) for network in networks)
    assert rough.dtype == jnp.float32
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(rough, exact, atol=0.1 * np.abs(exact).max())


def test_kernels_train_the_network_that_layers_do():
    """Has drop path on, because both forms draw the same numbers.

    They also have the same parameters and statistics.
    """
    # With 16 channels at the stem and 8 x 8 positions, no block is too large for the kernels.
    layers, kernels = (build("test", mbconv=form, bn_groups=2) for form in ("layers", "pallas"))
    variables, images = make_variables(layers), make_images(256, 16)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(network, params):
        def loss(params):
            logits, batch_stats = train(network, variables | {"params": params}, images)
            return jnp.mean(jnp.square(logits)), (logits, batch_stats)

        return jax.grad(loss, has_aux=True)(params)

    expected, actual = (everything(network, variables["params"]) for network in (layers, kernels))
    atol = 1e-5 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=atol)


def count_kernels(network, images, **options):
    """Returns the number of kernels in the program of a pass."""
    variables = shapes_of(network)

    def run(variables):
        return network.apply(
            variables,
            images,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
            **options,
        )

    return str(jax.make_jaxpr(run)(variables)).count("pallas_call[")


def test_kernels_are_for_training():
    images = jnp.zeros((128, 48, 48, 3))
    assert count_kernels(build("test"), images, train=True) == 0
    assert count_kernels(build("test", mbconv="pallas"), images, train=False) == 0
    # Five blocks, whose maps need no strips, have three kernels each. They are traced twice, for
    # TPU and for other platforms.
    assert count_kernels(build("test", mbconv="pallas"), images, train=True) == 30


def test_kernels_refuse_a_part_of_128_images():
    network = build("test", mbconv="pallas", bn_groups=2)
    with pytest.raises(UserError, match=r"set config\.batch_size to a multiple of 256"):
        count_kernels(network, jnp.zeros((128, 32, 32, 3)), train=True)


def test_batch_statistics_move_in_training_only():
    network = build("test", **STILL)
    variables, images = make_variables(network), make_images(2)
    evaluate(network, variables, images)  # raises if it writes: batch_stats are immutable here
    _, after = train(network, variables, images)
    for path, before in flatten_dict(variables["batch_stats"]).items():
        assert not np.array_equal(flatten_dict(after)[path], before), path


def test_bn_groups_are_batches_of_their_own():
    images = make_images(4) * np.array([1, 1, 3, 3], np.float32)[:, None, None, None]
    alone, grouped = build("test", **STILL), build("test", bn_groups=2, **STILL)
    variables = make_variables(alone)
    logits, stats = train(grouped, variables, images)
    parts = [train(alone, variables, part) for part in np.split(images, 2)]
    expected = np.concatenate([part for part, _ in parts])
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    means = jax.tree.map(lambda a, b: (a + b) / 2, *[part for _, part in parts])
    for a, e in zip(jax.tree.leaves(stats), jax.tree.leaves(means), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3)
