"""ONNX of small functions, which onnxruntime runs; whole networks are in test_export.py."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.special import softmax

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from bef_jax.models.onnx.graph import to_onnx  # noqa: E402 (it imports onnx)


def test_a_select_between_broadcast_arrays_is_broadcast_too():
    def choose(x):
        def wide(v):
            return lax.broadcast_in_dim(v, x.shape, (0,))

        top = x.max(1)
        return lax.select(wide(jnp.isfinite(top)), wide(top), wide(0 * top)).sum(1)

    (n,) = jax.export.symbolic_shape("n")
    file = to_onnx(choose, jax.ShapeDtypeStruct((n, 4), jnp.float32), ["sums"])
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(file)
    (name,) = (argument.name for argument in session.get_inputs())
    (sums,) = session.run(None, {name: x})
    np.testing.assert_allclose(sums, 4 * x.max(1), rtol=1e-6)


def test_an_output_with_more_axes_than_the_batch_declares_them():
    (n,) = jax.export.symbolic_shape("n")
    argument = jax.ShapeDtypeStruct((n, 5), jnp.float32)
    file = to_onnx(lambda x: (jax.nn.softmax(x), x.sum(1)), argument, ["probability", "sum"])
    outputs = onnx.load_model_from_string(file).graph.output
    dims = [output.type.tensor_type.shape.dim for output in outputs]
    assert [[d.dim_param or d.dim_value for d in axes] for axes in dims] == [["n", 5], ["n"]]
    session = onnxruntime.InferenceSession(file)
    x = 100 * np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    found, _ = session.run(None, {"image": x})
    np.testing.assert_allclose(found, softmax(x, axis=1), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: _max_of(x, window_dilation=(1, 2, 2, 1)), "pool .* window_dilation"),
        (lambda x: _max_of(x, base_dilation=(1, 2, 2, 1)), "pool with base_dilation"),
        (lambda x: _conv(x, batch_group_count=2), "batch_group_count"),
        (lambda x: _conv(x, lhs_dilation=(2, 2)), "lhs_dilation"),
    ],
    ids=["dilated window", "dilated input", "grouped batch", "transposed convolution"],
)
def test_an_option_that_onnx_lacks_is_refused(function, reason):
    argument = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    assert jax.eval_shape(function, argument).ndim == 4  # so that JAX itself takes it
    with pytest.raises(NotImplementedError, match=f"no ONNX for a .*{reason}"):
        to_onnx(lambda x: (function(x),), argument, ["y"])


def _max_of(x, **dilations):
    lowest = -np.float32(np.inf)
    return lax.reduce_window(x, lowest, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "VALID", **dilations)


def _conv(x, **options):
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = np.ones((3, 3, 4, 4), np.float32)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), [(0, 0), (0, 0)], dimension_numbers=layout, **options
    )


def test_facts_are_read_back_from_the_file_unchanged():
    facts = {"classes": ["a", "b"], "mpp": None, "threshold": 0.3, "more": {"x": [1, "\u00b5m"]}}
    (n,) = jax.export.symbolic_shape("n")
    argument = jax.ShapeDtypeStruct((n, 4), jnp.float32)
    model = onnx.load_model_from_string(to_onnx(lambda x: (x.sum(1),), argument, ["y"], facts))
    assert {prop.key: json.loads(prop.value) for prop in model.metadata_props} == facts
    without_facts = onnx.load_model_from_string(to_onnx(lambda x: (x.sum(1),), argument, ["y"]))
    assert not without_facts.metadata_props


def _gated(x):
    """A small network: everything that keeps the channels first, and what ends it."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    layout = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, normal(3, 3, 4, 8), (1, 1), "SAME", dimension_numbers=layout)
    x = jnp.minimum(jnp.maximum(x + normal(8), 0.0), 6.0) @ normal(8, 6)
    gate = jax.nn.sigmoid(jax.nn.silu(x.mean((1, 2)) @ normal(6, 3)) @ normal(3, 6) + normal(6))
    x = jnp.concatenate([x * gate[:, None, None], jnp.tanh(x)], axis=-1)
    x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")
    return x.sum((1, 2)) / 3, jnp.maximum(x.mean((1, 2)), 0.1) @ normal(12, 2), x.max(-1)


def test_maps_keep_their_channels_first_from_the_first_convolution_on():
    argument = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 6, 6, 4), jnp.float32)
    file = to_onnx(_gated, argument, ["sums", "scores", "tops"])
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(file)
    for found, expected in zip(session.run(None, {"image": x}), _gated(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    nodes = [node.op_type for node in onnx.load_model_from_string(file).graph.node]
    # One before the first convolution, and one for the maximum over channels, which ends this.
    assert nodes.count("Transpose") == 2
    # Both bounds are in one node, so that a runtime can fuse it with the convolution.
    assert nodes.count("Clip") == 2 and not {"Max", "Min"} & {*nodes}


def test_a_bound_whose_map_is_read_again_stays():
    def twice(x):
        low = jnp.maximum(x, 0.0)
        return (jnp.minimum(low, 1.0), low, jnp.maximum(jnp.minimum(x, 1.0), 2.0))

    argument = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 4), jnp.float32)
    session = onnxruntime.InferenceSession(to_onnx(twice, argument, ["both", "low", "crossed"]))
    x = 3 * np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for found, expected in zip(session.run(None, {"image": x}), twice(x), strict=True):
        np.testing.assert_array_equal(found, expected)
