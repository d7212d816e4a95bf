"""Tests each kernel, on a simulated TPU, against loops over positions in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from bef_jax.models.layers import padding_of
from bef_jax.models.ops.mbconv import backward, forward
from bef_jax.models.ops.mbconv.grid import Strip, Window
from tests.models.ops.mbconv.test_block import as_on_tpu  # noqa: F401, a fixture

INPUTS, HIDDEN, OUTPUTS = 8, 16, 24
IMAGES, BLOCK = 256, 8  # two tiles of images, and two of channels
SIZE = (5, 4)

windows = pytest.mark.parametrize(
    ("kernel", "stride", "convention"),
    [(3, 1, "same"), (5, 1, "same"), (3, 2, "same"), (3, 2, "symmetric"), (5, 2, "symmetric")],
)
expansions = pytest.mark.parametrize("expands", [True, False], ids=["expands", "no expansion"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make_window(kernel, stride, convention):
    return Window(SIZE, kernel, stride, padding_of(kernel, stride, SIZE, convention))


def whole(window):
    """Returns a strip of all rows."""
    return Strip((0, SIZE[0]), (0, window.outputs[0]), window, BLOCK)


def single(*arrays):
    return [None if array is None else jnp.asarray(array, jnp.float32) for array in arrays]


def check(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def silu(z):
    return z / (1 + np.exp(-z))


def slope(z):
    gate = 1 / (1 + np.exp(-z))
    return gate * (1 + z * (1 - gate))


def make_inputs(window, expands):
    """Makes x, expand, shift and taps [E, k * k]."""
    x = normal(*SIZE, INPUTS if expands else HIDDEN, IMAGES)
    expand, shift = normal(HIDDEN, INPUTS, seed=1), normal(HIDDEN, 1, seed=2)
    taps = normal(HIDDEN, window.kernel**2, seed=3)
    return x, *((expand, shift) if expands else (None, None)), taps


def hidden_of(x, expand, shift):
    """Returns the maps before and after the activation, [H, W, E, N]."""
    if expand is None:
        return np.zeros_like(x), x
    z = np.einsum("ek,hwkn->hwen", expand, x) + shift
    return z, silu(z)


def padded_of(x, window):
    return np.pad(x, (*window.padding, (0, 0), (0, 0)))


def windows_of(window):
    """Yields (row, column) of each output, and the slice of the padded map that it reads."""
    for row, column in np.ndindex(window.outputs):
        top, left = row * window.stride, column * window.stride
        yield (row, column), np.s_[top : top + window.kernel, left : left + window.kernel]


@windows
@expansions
def test_expand_and_convolve(expands, kernel, stride, convention):
    window = make_window(kernel, stride, convention)
    inputs = make_inputs(window, expands)
    d, moments = forward.expand_and_convolve(*single(*inputs), whole(window), "silu")
    *narrow, taps = inputs
    hidden = padded_of(hidden_of(*narrow)[1], window)
    expected = np.zeros((*window.outputs, HIDDEN, IMAGES))
    for position, part in windows_of(window):
        square = hidden[part].reshape(kernel**2, HIDDEN, IMAGES)
        expected[position] = np.einsum("ten,et->en", square, taps)
    check(d, expected)
    check(moments, np.stack([expected.sum((0, 1)), (expected**2).sum((0, 1))]))


def make_maps(seed=4):
    """Makes d, the norm's factor and offset, the gate and the projection."""
    d, norm = normal(*SIZE, HIDDEN, IMAGES, seed=seed), normal(HIDDEN, 2, seed=5)
    gate, weights = normal(HIDDEN, IMAGES, seed=6), normal(HIDDEN, OUTPUTS, seed=7)
    return d, norm, gate, weights


def normed(d, norm):
    return d * norm[:, :1] + norm[:, 1:]


def test_pool():
    d, norm, *_ = make_maps()
    check(forward.pool(*single(d, norm), BLOCK, "silu"), silu(normed(d, norm)).sum((0, 1)))


def test_project():
    d, norm, gate, weights = make_maps()
    expected = np.einsum("hwen,em->hwmn", silu(normed(d, norm)) * gate, weights)
    check(forward.project(*single(d, norm, gate, weights), BLOCK, "silu"), expected)


def test_project_gradients():
    d, norm, gate, weights = make_maps()
    dy = normal(*SIZE, OUTPUTS, IMAGES, seed=8)
    inputs = single(d, dy, norm, gate, weights)
    sums, dweights = backward.project_gradients(*inputs, BLOCK, "silu")
    z, u = normed(d, norm), np.einsum("em,hwmn->hwen", weights, dy)
    terms = [u * silu(z), u * slope(z), u * slope(z) * d, slope(z), slope(z) * d]
    check(sums, np.stack([term.sum((0, 1)) for term in terms]))
    by_image = np.einsum("hwen,hwmn->nem", silu(z) * gate, dy)
    check(dweights, by_image.reshape(2, -1, HIDDEN, OUTPUTS).sum(1))


@windows
@expansions
def test_expand_and_convolve_gradients(expands, kernel, stride, convention):
    window = make_window(kernel, stride, convention)
    x, expand, shift, taps = make_inputs(window, expands)
    _, _, _, weights = make_maps()
    d = normal(*window.outputs, HIDDEN, IMAGES, seed=9)
    dy = normal(*window.outputs, OUTPUTS, IMAGES, seed=8)
    coefficients, gate_and_pull = normal(HIDDEN, 5, seed=10), normal(2, HIDDEN, IMAGES, seed=11)
    if expands:
        coefficients[:, 4:] = shift
    arrays = single(x, d, dy), single(expand, taps, weights, coefficients), single(gate_and_pull)
    actual = backward.expand_and_convolve_gradients(
        *arrays[0], arrays[1], *arrays[2], whole(window), "silu"
    )

    gated = np.einsum("em,hwmn->hwen", weights, dy) * gate_and_pull[0] + gate_and_pull[1]
    factor, offset, c, o = (coefficients[:, i : i + 1] for i in range(4))
    cotangent = gated * slope(d * factor + offset) * factor + d * c + o
    z, hidden = hidden_of(x, expand, shift)
    hidden = padded_of(hidden, window)
    dhidden, dtaps = np.zeros_like(hidden), np.zeros((IMAGES, HIDDEN, kernel**2))
    square = taps.T.reshape(kernel, kernel, HIDDEN, 1)
    for position, part in windows_of(window):
        dhidden[part] += square * cotangent[position]
        products = hidden[part] * cotangent[position]
        dtaps += products.reshape(kernel**2, HIDDEN, IMAGES).transpose(2, 1, 0)
    (top, _), (left, _) = window.padding
    dz = dhidden[top : top + SIZE[0], left : left + SIZE[1]] * (slope(z) if expands else 1)
    check(actual[3], dtaps.reshape(2, -1, HIDDEN, kernel**2).sum(1))
    if not expands:
        assert actual[1] is actual[2] is None
        check(actual[0], dz)
        return
    check(actual[0], np.einsum("ek,hwen->hwkn", expand, dz))
    by_image = np.einsum("hwen,hwkn->nek", dz, x)
    check(actual[1], by_image.reshape(2, -1, HIDDEN, INPUTS).sum(1))
    check(actual[2], dz.sum((0, 1)))
