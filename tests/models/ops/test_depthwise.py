import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bef_jax.models.layers import padding_of
from bef_jax.models.ops import depthwise
from bef_jax.models.ops.depthwise import depthwise_conv

CHANNELS = 3
# (batch, (height, width)). Sizes are odd, even and mixed, and some are smaller than a kernel of 5.
# Batches are below, at and above the eight images that the kernel's gradient adds up first.
SHAPES = [(1, (7, 6)), (3, (6, 7)), (8, (3, 3)), (12, (8, 5)), (2, (1, 2))]


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """Switches XLA's optimisation on, because these tests are about what it makes of the shifts."""
    disabled = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", disabled)


@pytest.fixture(autouse=True)
def on_cpu():
    """Runs on CPU, which has the shift form, also if the default device is another."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def make_case(batch, size, kernel, stride, convention):
    rng = np.random.default_rng(kernel * 10 + stride)
    padding = padding_of(kernel, stride, size, convention)
    height, width = (
        (n + sum(pad) - kernel) // stride + 1 for n, pad in zip(size, padding, strict=True)
    )
    x = rng.normal(size=(batch, *size, CHANNELS)).astype(np.float32)
    weights = rng.normal(size=(kernel, kernel, 1, CHANNELS)).astype(np.float32)
    cotangent = rng.normal(size=(batch, height, width, CHANNELS)).astype(np.float32)
    return x, weights, cotangent, padding


def by_loop(x, kernel, cotangent, stride, padding):
    """Returns the output, dx and dkernel, computed position by position in float64."""
    x, kernel, cotangent = (np.asarray(a, np.float64) for a in (x, kernel, cotangent))
    k, kernel = kernel.shape[0], kernel[:, :, 0]
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    output, dpadded, dkernel = np.zeros_like(cotangent), np.zeros_like(padded), 0.0
    for row in range(cotangent.shape[1]):
        for column in range(cotangent.shape[2]):
            top, left = row * stride, column * stride
            window = np.s_[:, top : top + k, left : left + k]
            upstream = cotangent[:, row, column][:, None, None]
            output[:, row, column] = (padded[window] * kernel).sum((1, 2))
            dpadded[window] += upstream * kernel
            dkernel = dkernel + (padded[window] * upstream).sum(0)
    (top, _), (left, _) = padding
    dx = dpadded[:, top : top + x.shape[1], left : left + x.shape[2]]
    return output, dx, dkernel[:, :, None]


def by_lax(x, kernel, cotangent, stride, padding):
    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=CHANNELS,
        )

    output, pullback = jax.vjp(convolve, x, kernel)
    return output, *pullback(cotangent)


def by_shifts(x, kernel, cotangent, stride, padding):
    output, pullback = jax.vjp(lambda x, k: depthwise_conv(x, k, stride, padding), x, kernel)
    return output, *pullback(cotangent)


def assert_same(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, np.abs(e).max()))


# The conventions differ at stride 2 only.
@pytest.mark.parametrize(("stride", "convention"), [(1, "same"), (2, "same"), (2, "symmetric")])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("batch", "size"), SHAPES)
def test_output_and_gradients(batch, size, kernel, stride, convention):
    x, weights, cotangent, padding = make_case(batch, size, kernel, stride, convention)

    @jax.jit
    def both(*arrays):
        return [form(*arrays, stride, padding) for form in (by_shifts, by_lax)]

    shifts, native = both(x, weights, cotangent)
    assert_same(shifts, by_loop(x, weights, cotangent, stride, padding), 2e-6)
    assert_same(shifts, native, 2e-6)


@pytest.mark.parametrize("convention", ["same", "symmetric"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("batch", "size"), SHAPES)
def test_gradients_that_a_gpu_takes_at_stride_2(batch, size, kernel, convention):
    *arrays, padding = make_case(batch, size, kernel, 2, convention)
    gradients = jax.jit(lambda *arrays: depthwise._mixed_gradients(*arrays, 2, padding))
    assert_same(gradients(*arrays), by_loop(*arrays, 2, padding)[1:], 2e-6)


@pytest.mark.smoke
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_without_jit(kernel, stride):
    x, weights, cotangent, padding = make_case(3, (6, 7), kernel, stride, "same")
    actual = by_shifts(
        jnp.asarray(x), jnp.asarray(weights), jnp.asarray(cotangent), stride, padding
    )
    assert_same(actual, by_loop(x, weights, cotangent, stride, padding), 2e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16(stride):
    *arrays, padding = make_case(8, (8, 7), 3, stride, "symmetric")
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    actual = jax.jit(lambda *a: by_shifts(*a, stride, padding))(*arrays)
    assert [a.dtype for a in actual] == [jnp.bfloat16] * 3
    assert_same(actual, by_loop(*arrays, stride, padding), 0.02)


def test_kernel_gradient_of_bfloat16_is_summed_in_float32():
    """Adds up 4,096 ones, which would end at 256 in bfloat16."""
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 1, 1), jnp.bfloat16)
    _, pullback = jax.vjp(lambda k: depthwise_conv(x, k, 1, ((1, 1), (1, 1))), kernel)
    (dkernel,) = pullback(x)
    assert dkernel[1, 1, 0, 0] == 4096


@pytest.mark.smoke
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", ["forward", "gradient"])
@pytest.mark.parametrize(("platform", "native"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_platform_decides_at_lowering(platform, native, form, stride):
    x, weights, cotangent, padding = make_case(2, (6, 6), 3, stride, "same")

    def forward(x, kernel, _):
        return depthwise_conv(x, kernel, stride, padding)

    function = forward if form == "forward" else lambda *a: by_shifts(*a, stride, padding)[1:]
    traced = jax.jit(function).trace(x, weights, cotangent)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    shifts_dx = (platform, stride) == ("cuda", 2)
    wanted = native * (1 if form == "forward" or shifts_dx else 2)  # one each for dx and dkernel
    assert text.count("stablehlo.convolution") >= wanted
    assert wanted or "convolution" not in text


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default backend is not the CPU")
def test_default_lowering_on_cpu_holds_no_convolution():
    x, weights, _, padding = make_case(2, (6, 6), 5, 2, "same")
    loss = jax.grad(lambda x, k: depthwise_conv(x, k, 2, padding).sum(), argnums=(0, 1))
    text = jax.jit(loss).lower(x, weights).as_text()
    assert "stablehlo.multiply" in text
    assert "convolution" not in text
