"""Translates JAX's primitives into operators of ONNX; `values` says which axes they have."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper

from bef_jax.models.onnx.values import Graph, Value

# Adds one primitive's nodes, and returns its value, or the name of a tensor with the shape of the
# result. It takes the graph, the jaxpr's equation and the values that this reads.
Operator = Callable[[Graph, Any, list[Value]], Value | str]

# Primitives that equal one operator of ONNX; operands broadcast.
_ELEMENTWISE = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "exp": "Exp",
    "log": "Log",
    "logistic": "Sigmoid",
    "mul": "Mul",
    "neg": "Neg",
    "sign": "Sign",
    "sqrt": "Sqrt",
    "stop_gradient": "Identity",
    "sub": "Sub",
    "tanh": "Tanh",
}


def _elementwise(operator: str) -> Operator:
    def add(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
        shape, first = equation.outvars[0].aval.shape, _is_channels_first(inputs)
        name = graph.add(operator, _operands(graph, inputs))
        return Value(name, shape, narrow=_is_narrow(inputs), channels_first=first)

    return add


def _operands(graph: Graph, inputs: list[Value]) -> list[str]:
    """Returns the names of tensors that broadcast with each other, all with the same axes."""
    first = _is_channels_first(inputs)
    return [graph.channels_first(x) if first else graph.broadcastable(x) for x in inputs]


def _is_channels_first(inputs: list[Value]) -> bool:
    return any(value.channels_first for value in inputs)


def _is_narrow(inputs: list[Value]) -> bool:
    # One input of full shape gives the result its full shape. Constants count as narrow. At worst,
    # this adds an Expand that does nothing.
    return all(value.narrow or value.constant is not None for value in inputs)


def _bound(graph: Graph, equation: Any, inputs: list[Value], which: str) -> Value:
    """Adds max(x, y), or min: a Clip if y is a number, which runtimes fuse with a convolution."""
    x, limit = sorted(inputs, key=lambda value: value.constant is not None)
    if x.constant is not None or limit.constant is None or limit.constant.ndim:
        return _elementwise(which)(graph, equation, inputs)
    # The lower bound that is there already, such as relu6's 0, goes into the same Clip.
    name, bounds = graph.clips.get(x.name, (x.name, {})) if which == "Min" else (x.name, {})
    bounds = bounds | {which: graph.constant(limit.constant)}
    inputs = [name, bounds.get("Max", ""), bounds.get("Min", "")]
    clipped = graph.add("Clip", inputs if inputs[2] else inputs[:2])
    graph.clips[clipped] = (name, bounds)
    return dataclasses.replace(x, name=clipped)


def _select(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    # JAX passes the cases as false, true; ONNX takes true, false.
    which, false, true = _operands(graph, inputs)
    shape, first = equation.outvars[0].aval.shape, _is_channels_first(inputs)
    name = graph.add("Where", [which, true, false])
    return Value(name, shape, narrow=_is_narrow(inputs), channels_first=first)


def _rsqrt(graph: Graph, _: Any, inputs: list[Value]) -> str:
    return graph.add("Reciprocal", [graph.add("Sqrt", [graph.expanded(inputs[0])])])


def _is_finite(graph: Graph, _: Any, inputs: list[Value]) -> str:
    x = graph.expanded(inputs[0])
    return graph.add("Not", [graph.add("Or", [graph.add("IsInf", [x]), graph.add("IsNaN", [x])])])


def _cast(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"]))
    (x,) = inputs
    name = graph.add("Cast", _operands(graph, [x]), to=kind)
    return dataclasses.replace(x, name=name, constant=None)


def _broadcast(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    """Puts the axes in their places; the operator that reads the result broadcasts them."""
    (x,), shape = inputs[:1], equation.outvars[0].aval.shape
    places = equation.params["broadcast_dimensions"]
    # A vector for each position of a map, such as the gate of squeeze-excite, broadcasts as it is.
    if x.channels_first and len(shape) == 4 and places in ((0, 3), (0, 1, 2, 3)):
        return Value(x.name, shape, narrow=True, channels_first=True)
    new = [axis for axis in range(len(shape)) if axis not in places]
    # A constant is not expanded: in the file it would be as large as the map that it is combined
    # with, and the size of a batch in the shape is not known.
    if x.constant is not None:
        return Value("", shape, np.expand_dims(x.constant, new), narrow=True)
    name = graph.broadcastable(x)
    if new:
        name = graph.add("Unsqueeze", [name, graph.integers(*new)])
    grows = x.narrow or new or any(shape[to] != x.shape[i] for i, to in enumerate(places))
    return Value(name, shape, narrow=bool(grows))


def _reshape(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    # -1 stands for the one size that depends on the batch.
    sizes = [size if isinstance(size, int) else -1 for size in equation.outvars[0].aval.shape]
    return graph.add("Reshape", [graph.expanded(inputs[0]), graph.integers(*sizes)])


def _squeeze(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    axes = graph.integers(*equation.params["dimensions"])
    return graph.add("Squeeze", [graph.expanded(inputs[0]), axes])


def _slice(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    """Slices every axis except the batch, which is taken whole."""
    params, shape = equation.params, inputs[0].shape
    axes = [axis for axis, size in enumerate(shape) if isinstance(size, int)]
    steps = params["strides"] or [1] * len(shape)
    # Slice takes starts, ends, axes and steps. range(n)[axis] is the axis itself.
    parts = (
        graph.integers(*(values[axis] for axis in axes))
        for values in (params["start_indices"], params["limit_indices"], range(len(shape)), steps)
    )
    return graph.add("Slice", [graph.expanded(inputs[0]), *parts])


def _reduce(operator: str) -> Operator:
    def add_reduction(graph: Graph, equation: Any, inputs: list[Value]) -> str:
        axes = graph.integers(*equation.params["axes"])
        # By default, ONNX keeps reduced axes as 1.
        return graph.add(operator, [graph.expanded(inputs[0]), axes], keepdims=0)

    return add_reduction


def _reduce_sum(graph: Graph, equation: Any, inputs: list[Value]) -> Value | str:
    (x,), axes = inputs, equation.params["axes"]
    if not x.channels_first or axes != (1, 2) or x.narrow:
        return _reduce("ReduceSum")(graph, equation, inputs)
    # A global mean times the number of positions, because runtimes keep their own order of channels
    # through the mean, and not through a sum.
    mean, positions = graph.add("GlobalAveragePool", [x.name]), np.float32(x.shape[1] * x.shape[2])
    name = graph.add("Mul", [mean, graph.constant(positions)])
    graph.means[name] = (mean, positions)
    return Value(name, equation.outvars[0].aval.shape, channels_first=True)


def _divide(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    x, divisor = inputs
    mean, positions = graph.means.get(x.name, ("", None))
    if divisor.constant is not None and np.array_equal(divisor.constant, positions):
        return dataclasses.replace(x, name=mean)
    return _elementwise("Div")(graph, equation, inputs)


def _concatenate(graph: Graph, equation: Any, inputs: list[Value]) -> Value | str:
    axis, shape = equation.params["dimension"], equation.outvars[0].aval.shape
    if axis != len(shape) - 1 or not _is_channels_first(inputs) or _is_any_narrow(inputs):
        return graph.add("Concat", map(graph.expanded, inputs), axis=axis)
    name = graph.add("Concat", map(graph.channels_first, inputs), axis=1)
    return Value(name, shape, channels_first=True)


def _is_any_narrow(inputs: list[Value]) -> bool:
    return any(value.narrow or value.constant is not None for value in inputs)


def _stack(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    axis = equation.params["axis"]
    parts = [graph.add("Unsqueeze", [graph.expanded(x), graph.integers(axis)]) for x in inputs]
    return graph.add("Concat", parts, axis=axis)


def _matmul(graph: Graph, equation: Any, inputs: list[Value]) -> Value | str:
    (left, right), batched = equation.params["dimension_numbers"]
    x, kernel = inputs
    # Features must come last, and the kernel must be [in, out].
    if (left, right, batched) != ((len(x.shape) - 1,), (0,), ((), ())):
        raise NotImplementedError(
            f"no ONNX for a product of {x.shape} and {kernel.shape} over {left}, {right}"
        )
    if kernel.constant is None or not (x.channels_first or len(x.shape) == 4):
        return graph.add("MatMul", [graph.expanded(x), graph.expanded(kernel)])
    # A product at every position is a 1 x 1 convolution. A narrow x has the same value at all.
    weights = graph.constant(kernel.constant.T[:, :, None, None])
    name = graph.add("Conv", [graph.channels_first(x), weights])
    shape = equation.outvars[0].aval.shape
    return Value(name, shape, narrow=x.narrow, channels_first=True)


def _convolution(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    params, (x, kernel) = equation.params, inputs
    numbers = params["dimension_numbers"]
    if (
        kernel.constant is None
        or set(params["lhs_dilation"]) != {1}
        or params["batch_group_count"] != 1
        or numbers.lhs_spec != (0, 3, 1, 2)
        or numbers.out_spec != (0, 3, 1, 2)
    ):
        raise NotImplementedError(
            "no ONNX for a convolution of other maps than [N, H, W, C], with lhs_dilation or "
            "batch_group_count, or whose kernel is not constant"
        )
    # The spec lists JAX's axes in ONNX's order, [out, in, h, w].
    weights = graph.constant(np.transpose(kernel.constant, numbers.rhs_spec))
    name = graph.add(
        "Conv",
        [_whole(graph, x), weights],
        strides=params["window_strides"],
        pads=_ends(params["padding"]),
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return Value(name, equation.outvars[0].aval.shape, channels_first=True)


def _whole(graph: Graph, x: Value) -> str:
    """Returns the name of a tensor [N, C, H, W] that has the size of the map `x`."""
    if x.narrow or x.constant is not None:
        x = Value(graph.expanded(x), x.shape)
    return graph.channels_first(x)


def _pool(
    graph: Graph, equation: Any, inputs: list[Value], operator: str, **attributes: Any
) -> Value:
    """Pools over the two middle axes of [N, H, W, C]."""
    params = equation.params
    if {*params["base_dilation"], *params["window_dilation"]} != {1}:
        raise NotImplementedError("no ONNX for a pool with base_dilation or window_dilation")
    windows = {
        "kernel_shape": params["window_dimensions"][1:3],
        "strides": params["window_strides"][1:3],
        "pads": _ends(params["padding"][1:3]),
    }
    name = graph.add(operator, [_whole(graph, inputs[0])], **windows, **attributes)
    return Value(name, equation.outvars[0].aval.shape, channels_first=True)


def _sum_pool(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    # ONNX has no pool that sums. With the padding counted, the mean is over the whole window.
    mean = _pool(graph, equation, inputs, "AveragePool", count_include_pad=1)
    count = np.float32(np.prod(equation.params["window_dimensions"]))
    return dataclasses.replace(mean, name=graph.add("Mul", [mean.name, graph.constant(count)]))


def _ends(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Returns all beginnings, then all ends, as ONNX takes them."""
    return [low for low, _ in padding] + [high for _, high in padding]


OPERATORS: dict[str, Operator] = {
    **{name: _elementwise(operator) for name, operator in _ELEMENTWISE.items()},
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "div": _divide,
    "dot_general": _matmul,
    "is_finite": _is_finite,
    "max": functools.partial(_bound, which="Max"),
    "min": functools.partial(_bound, which="Min"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_sum": _reduce_sum,
    "reduce_window_max": functools.partial(_pool, operator="MaxPool"),
    "reduce_window_sum": _sum_pool,
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
}
