import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bef_jax.models.layers import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    DropPath,
    SqueezeExcite,
    global_pool,
    padding_of,
)
from bef_jax.models.ops.norm import batch_norm

EPSILON = 1e-3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_same_padding_is_tensorflows(kernel, stride):
    def documented(size):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    for size in range(1, 40):
        expected = (documented(size), documented(size + 1))
        assert padding_of(kernel, stride, (size, size + 1), "same") == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "side"), [(1, 0), (3, 1), (5, 2), (7, 3)])
def test_symmetric_padding_is_torchs(kernel, side, stride):
    for size in (6, 7):
        padding = padding_of(kernel, stride, (size, size), "symmetric")
        assert padding == ((side, side), (side, side))


def test_conventions_differ_where_stride_2_meets_an_even_size():
    assert padding_of(3, 2, (96, 96), "same") == ((0, 1), (0, 1))
    assert padding_of(3, 2, (96, 96), "symmetric") == ((1, 1), (1, 1))
    assert padding_of(3, 2, (97, 97), "same") == padding_of(3, 2, (97, 97), "symmetric")


# ---- convolutions -------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_conv_is_laxs(kernel, stride, padding):
    x, weights = normal(2, 6, 7, 3), normal(kernel, kernel, 3, 5, seed=1)
    conv = Conv(5, kernel, stride, padding)
    created = conv.init(jax.random.key(0), x)["params"]["kernel"]
    assert created.shape == weights.shape
    pads = "SAME" if padding == "same" else [(kernel // 2, kernel // 2)] * 2
    expected = lax.conv_general_dilated(
        x, weights, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    actual = conv.apply({"params": {"kernel": weights}}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_conv_1x1_mixes_channels_at_each_position():
    x, weights = normal(2, 3, 4, 5), normal(1, 1, 5, 7, seed=1)
    actual = Conv(7, 1).apply({"params": {"kernel": weights}}, x)
    expected = np.einsum("nhwc,cd->nhwd", np.float64(x), np.float64(weights[0, 0]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_depthwise_layer_is_laxs_grouped_convolution():
    x = normal(2, 6, 7, 4)
    layer = DepthwiseConv(5, 2)
    variables = layer.init(jax.random.key(0), x)
    expected = lax.conv_general_dilated(
        x,
        variables["params"]["kernel"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "fan_out"), [(Conv(64, 3), 9 * 64), (Conv(512, 1), 512), (DepthwiseConv(5), 25)]
)
def test_kernels_start_with_variance_2_over_fan_out(layer, fan_out):
    kernel = layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 64)))["params"]["kernel"]
    assert np.var(kernel) == pytest.approx(2 / fan_out, rel=0.15)


@pytest.mark.parametrize("layer", [Conv(4, 1, dtype=jnp.bfloat16), Conv(4, 3, dtype=jnp.bfloat16),
                                   DepthwiseConv(3, dtype=jnp.bfloat16)])  # fmt: skip
def test_convolutions_compute_in_bfloat16_from_float32_parameters(layer):
    output, variables = layer.init_with_output(jax.random.key(0), normal(1, 4, 4, 4))
    assert output.dtype == jnp.bfloat16
    assert variables["params"]["kernel"].dtype == jnp.float32


# ---- batch normalisation ------------------------------------------------------------------------


def plain_batch_norm(x, scale, bias):
    """Computes the definition, with the variance in two passes and JAX's own gradient."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - mean).mean(axes)
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias


def make_variables(channels):
    return {
        "params": {"scale": normal(channels, seed=1) + 1, "bias": normal(channels, seed=2)},
        "batch_stats": {
            "mean": normal(channels, seed=3),
            "var": normal(channels, seed=4) ** 2 + 0.1,
        },
    }


@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (16, 3)])
def test_batch_norm_trains_like_linens(shape):
    x, variables = normal(*shape) * 2 + 3, make_variables(3)
    other = nn.BatchNorm(momentum=0.8, epsilon=EPSILON)
    expected, expected_stats = other.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"]
    )
    ours = BatchNorm(momentum=0.8, epsilon=EPSILON)
    actual, stats = ours.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            stats["batch_stats"][name], expected_stats["batch_stats"][name], rtol=1e-5
        )


def test_running_statistics_keep_the_share_of_momentum():
    x, variables = np.float64(normal(8, 2, 2, 3)) + 5, make_variables(3)
    _, stats = BatchNorm(momentum=0.75).apply(
        variables, jnp.float32(x), True, mutable=["batch_stats"]
    )
    for name, new in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
        expected = 0.75 * variables["batch_stats"][name] + 0.25 * new
        np.testing.assert_allclose(stats["batch_stats"][name], expected, rtol=1e-5)


def test_batch_norm_evaluates_by_running_statistics():
    x, variables = normal(2, 3, 3, 4), make_variables(4)
    params, stats = variables["params"], variables["batch_stats"]
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON)
    expected = expected * params["scale"] + params["bias"]
    actual, updates = BatchNorm(epsilon=EPSILON).apply(variables, x, False, mutable=["batch_stats"])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(updates["batch_stats"][name], stats[name])


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_with_silu_is_silu_after_batch_norm(train):
    x, variables = normal(4, 3, 3, 5), make_variables(5)
    plain = BatchNorm().apply(variables, x, train, mutable=["batch_stats"])[0]
    actual = BatchNorm(activation="silu").apply(variables, x, train, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(actual, plain * sigmoid(plain), rtol=1e-5, atol=1e-6)


def test_initialising_in_training_mode_leaves_the_statistics_at_their_start():
    variables = BatchNorm().init(jax.random.key(0), normal(4, 2, 2, 3) + 7, True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))


ACTIVATIONS = {
    "none": lambda y: y,
    "silu": lambda y: y / (1 + jnp.exp(-y)),
    "relu": lambda y: jnp.maximum(y, 0),
    "relu6": lambda y: jnp.clip(y, 0, 6),
}


@pytest.mark.smoke
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_batch_norm_gradient_is_that_of_the_definition(groups, activation):
    # The values are far enough apart that ReLU6 meets both of its corners.
    arrays = normal(6, 4, 5, 3) * 2 + 3, 3 * normal(3, seed=1) + 1, normal(3, seed=2) + 2
    cotangent = normal(6, 4, 5, 3, seed=3)

    def ours(*arrays):
        return batch_norm(*arrays, groups, EPSILON, activation)[0]

    def plain(x, scale, bias):
        parts = [plain_batch_norm(part, scale, bias) for part in jnp.split(x, groups)]
        y = jnp.concatenate(parts)
        return ACTIVATIONS[activation](y)

    def with_gradients(function):
        y, pullback = jax.vjp(function, *arrays)
        return y, *pullback(cotangent)

    actual, expected = jax.jit(lambda: [with_gradients(ours), with_gradients(plain)])()
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=2e-4)


def test_batch_norm_gradient_is_the_difference_quotient():
    """Compares with NumPy in float64, so that no derivative here is JAX's own."""
    x, weights = np.float64(normal(4, 2, 2, 2)), np.float64(normal(4, 2, 2, 2, seed=1))
    scale, bias = np.array([1.5, -0.5]), np.array([0.25, 2.0])

    def loss(x, scale, bias):
        axes = (0, 1, 2)
        y = (x - x.mean(axes)) / np.sqrt(x.var(axes) + EPSILON) * scale + bias
        return (y * weights).sum()

    def ours(*arrays):
        return (batch_norm(*arrays, 1, EPSILON)[0] * weights).sum()

    arrays = [x, scale, bias]
    gradients = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*[jnp.float32(a) for a in arrays])
    for which, gradient in enumerate(map(np.asarray, gradients)):
        for at in np.ndindex(arrays[which].shape):
            step = np.zeros_like(arrays[which])
            step[at] = 1e-5
            up, down = ([*arrays[:which], arrays[which] + s, *arrays[which + 1 :]]
                        for s in (step, -step))  # fmt: skip
            quotient = (loss(*up) - loss(*down)) / 2e-5
            assert gradient[at] == pytest.approx(quotient, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_separate_batch_norms(groups):
    # The groups have very different statistics, so that mixing them would fail the test.
    offsets = np.arange(groups).repeat(8 // groups)[:, None, None, None]
    x, variables = normal(8, 3, 3, 2) * (1 + offsets) + 10 * offsets, make_variables(2)

    def train(x, groups):
        return BatchNorm(groups=groups).apply(variables, x, True, mutable=["batch_stats"])

    actual, stats = train(x, groups)
    alone = [train(part, 1) for part in np.split(x, groups)]
    np.testing.assert_allclose(actual, np.concatenate([y for y, _ in alone]), rtol=1e-4, atol=1e-4)
    for name in ("mean", "var"):
        expected = np.mean([s["batch_stats"][name] for _, s in alone], axis=0)
        np.testing.assert_allclose(stats["batch_stats"][name], expected, rtol=1e-5)


def test_batch_norm_of_a_constant_channel_is_finite():
    x = jnp.full((4, 3, 3, 1), 1000.3)  # for some constants E[x^2] - E[x]^2 is below zero

    def loss(x):
        return batch_norm(x, jnp.ones(1), jnp.full(1, 2.0), 1, EPSILON)[0].sum()

    y, _, var = batch_norm(x, jnp.ones(1), jnp.full(1, 2.0), 1, EPSILON)
    assert np.isfinite(y).all()
    assert (var >= 0).all()
    assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    x = jnp.asarray(normal(8, 4, 4, 3) + 2, jnp.bfloat16)
    layer = BatchNorm(momentum=0.0, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, True)
    y, updates = layer.apply(variables, x, True, mutable=["batch_stats"])
    exact = np.float64(x)
    assert y.dtype == jnp.bfloat16
    for name, expected in (("mean", exact.mean((0, 1, 2))), ("var", exact.var((0, 1, 2)))):
        actual = updates["batch_stats"][name]
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    dx = jax.grad(lambda x: batch_norm(x, jnp.ones(3), jnp.ones(3), 1, EPSILON)[0][0].sum())(x)
    assert dx.dtype == jnp.bfloat16
    assert layer.apply(variables, x, False).dtype == jnp.bfloat16


# ---- pooling, gates, stochastic depth -----------------------------------------------------------


def test_global_pool_is_a_float32_mean():
    x = jnp.full((1, 48, 48, 2), 1.0, jnp.bfloat16).at[0, 0, 0, 0].set(100.0)
    pooled = global_pool(x)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, [[1 + 99 / 48**2, 1.0]], rtol=1e-6)


@pytest.mark.smoke
def test_squeeze_excite_is_the_formula():
    x = normal(3, 4, 5, 6)
    layer = SqueezeExcite(hidden=2)
    params = layer.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "reduce": {"kernel": (6, 2), "bias": (2,)},
        "expand": {"kernel": (2, 6), "bias": (6,)},
    }
    params = jax.tree.map(lambda p: normal(*p.shape, seed=p.size), params)
    reduce, expand = params["reduce"], params["expand"]
    hidden = x.mean((1, 2)) @ reduce["kernel"] + reduce["bias"]
    hidden = hidden * sigmoid(hidden)
    gate = sigmoid(hidden @ expand["kernel"] + expand["bias"])
    actual = layer.apply({"params": params}, x)
    np.testing.assert_allclose(actual, x * gate[:, None, None], rtol=1e-4, atol=1e-5)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    x = normal(4000, 2, 2, 3) + 3
    y = DropPath(0.3).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(y != 0).reshape(len(x), -1)
    whole = kept.all(1)
    assert (whole | ~kept.any(1)).all()
    assert whole.mean() == pytest.approx(0.7, abs=0.03)  # 4 standard deviations
    np.testing.assert_allclose(y[whole], x[whole] / 0.7, rtol=1e-5)
    assert np.mean(y) == pytest.approx(x.mean(), rel=0.04)


@pytest.mark.parametrize(("rate", "train"), [(0.3, False), (0.0, True)])
def test_drop_path_that_is_off_needs_no_key(rate, train):
    x = normal(5, 2, 2, 3)
    np.testing.assert_array_equal(DropPath(rate).apply({}, x, train), x)
