"""Translates a JAX function into an ONNX graph, as far as the networks here need for inference.

jax2onnx translates far more, but it limits Orbax to versions below the one that checkpoints here
need. An unknown primitive is refused by name, never guessed.

Arrays keep JAX's order of axes (NHWC). ONNX has convolutions and pooling in NCHW only, so each of
them stands between two transpositions. A runtime's optimiser removes most of these.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper, numpy_helper

from bef_jax import __version__

OPSET = 18  # from 2022; since then, reductions take their axes as an input
IR_VERSION = 9  # older runtimes refuse newer ones

# JAX's primitives that equal one operator of ONNX; operands broadcast.
_ELEMENTWISE = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "div": "Div",
    "exp": "Exp",
    "log": "Log",
    "logistic": "Sigmoid",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "sign": "Sign",
    "sqrt": "Sqrt",
    "stop_gradient": "Identity",
    "sub": "Sub",
    "tanh": "Tanh",
}


@dataclass(frozen=True)
class Value:
    """The tensor in the graph that stands for a variable of a jaxpr.

    Attributes:
        name: of the tensor.
        shape: the one that JAX gives it; the batch is symbolic.
        constant: its content, if that does not depend on the input.
        narrow: whether it has axes of 1 where `shape` is larger, and relies on broadcasting.
    """

    name: str
    shape: tuple
    constant: np.ndarray | None = None
    narrow: bool = False


@dataclass
class Graph:
    """The nodes and constants that were added so far."""

    nodes: list = field(default_factory=list)
    initializers: list = field(default_factory=list)
    _constant_names: dict = field(default_factory=dict)

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node with one output, and returns the output's name."""
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        """Adds a constant, unless an equal one is there, and returns its name."""
        array = np.ascontiguousarray(array)
        # The key has the content, so while the graph is built every weight is in memory once more.
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constant_names:
            self._constant_names[key] = f"constant_{len(self._constant_names)}"
            self.initializers.append(numpy_helper.from_array(array, self._constant_names[key]))
        return self._constant_names[key]

    def integers(self, *values: int) -> str:
        """Adds an int64 vector, as ONNX takes axes and shapes, and returns its name."""
        return self.constant(np.array(values, np.int64))

    def broadcastable(self, value: Value) -> str:
        """Returns the name of a tensor that broadcasts to the value's shape."""
        return value.name if value.constant is None else self.constant(value.constant)

    def expanded(self, value: Value) -> str:
        """Returns the name of a tensor that has the value's shape."""
        if not value.narrow:
            return self.broadcastable(value)
        # 1 stands for the batch, because Expand leaves a larger axis as it is.
        sizes = [size if isinstance(size, int) else 1 for size in value.shape]
        return self.add("Expand", [self.broadcastable(value), self.integers(*sizes)])


def to_onnx(
    function: Callable,
    argument: jax.ShapeDtypeStruct,
    output_names: Sequence[str],
    facts: Mapping[str, Any] | None = None,
) -> bytes:
    """Translates `function(image)`, which holds its parameters itself, into an ONNX file.

    Args:
        function: takes one array, and returns a tuple of arrays [n, ...], float32.
        argument: the array's shape, whose first axis n is symbolic, and its dtype.
        output_names: those of the returned arrays; the input is called `image`.
        facts: the file's metadata, by name; each value is written as JSON.

    Raises:
        NotImplementedError: the function has a primitive that is not known here.
    """
    closed = jax.make_jaxpr(function)(argument)
    graph, image = Graph(), Value("image", argument.shape)
    results = _run(graph, closed.jaxpr, list(map(_known, closed.consts)), [image])
    # An Identity gives a result its public name, because its own tensor is named after a node.
    for value, name in zip(results, output_names, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.expanded(value)], [name], name))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(argument.dtype))
    shape = ["n", *argument.shape[1:]]
    inputs = [helper.make_tensor_value_info("image", kind, shape)]
    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", *value.shape[1:]])
        for value, name in zip(results, output_names, strict=True)
    ]
    content = helper.make_graph(graph.nodes, "bef_jax", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    made_by = {"producer_name": "bef_jax", "producer_version": __version__}
    model = helper.make_model(content, opset_imports=opsets, ir_version=IR_VERSION, **made_by)
    # ONNX has metadata as text only.
    helper.set_model_props(model, {name: json.dumps(fact) for name, fact in (facts or {}).items()})
    # An invalid file fails here, and not on a server.
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _known(array: Any) -> Value:
    array = np.asarray(array)
    return Value("", array.shape, array)


def _run(graph: Graph, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
    """Adds a jaxpr's equations, and returns its results."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(atom: Any) -> Value:
        return _known(atom.val) if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        results = _equation(graph, equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(graph: Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    name, shapes = equation.primitive.name, [var.aval.shape for var in equation.outvars]
    called = _called(equation)
    if called is not None:
        # The first input of a cond chooses the branch; the branch takes the other inputs.
        inputs = inputs[1:] if name == "cond" else inputs
        return _run(graph, called.jaxpr, [_known(const) for const in called.consts], inputs)
    if name == "platform_index":
        return [_known(np.int32(0))]  # it only chooses a branch, which `_called` does
    # A result that depends on weights only is computed now, and becomes a constant. That can't be
    # done if the batch is in the shape, because its size is not known yet.
    if all(value.constant is not None for value in inputs) and _is_concrete(shapes):
        results = equation.primitive.bind(*(v.constant for v in inputs), **equation.params)
        return [_known(x) for x in (results if equation.primitive.multiple_results else [results])]
    if name in _ELEMENTWISE:
        return [_elementwise(graph, _ELEMENTWISE[name], inputs, shapes[0])]
    if name not in _OPERATORS:
        raise NotImplementedError(f"{name} is not among the operators that can be exported to ONNX")
    result = _OPERATORS[name](graph, equation, inputs)
    return [result if isinstance(result, Value) else Value(result, shapes[0])]


def _called(equation: Any) -> Any:
    """Returns the closed jaxpr that an equation calls, or None; of a cond, the default branch."""
    params = equation.params
    if equation.primitive.name == "cond":
        return params["branches"][-1]  # where `lax.platform_dependent` puts its default
    return params.get("call_jaxpr", params.get("jaxpr"))


def _is_concrete(shapes: list[tuple]) -> bool:
    return all(isinstance(size, int) for shape in shapes for size in shape)


# ---- operators ----------------------------------------------------------------------------------


def _elementwise(graph: Graph, operator: str, inputs: list[Value], shape: tuple) -> Value:
    # One input of full shape gives the result its full shape. Constants count as narrow. At worst,
    # this adds an Expand that does nothing.
    narrow = all(value.narrow or value.constant is not None for value in inputs)
    return Value(graph.add(operator, map(graph.broadcastable, inputs)), shape, narrow=narrow)


def _select(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    # JAX passes the cases as false, true; ONNX takes true, false.
    which, false, true = map(graph.broadcastable, inputs)
    narrow = all(value.narrow or value.constant is not None for value in inputs)
    shape = equation.outvars[0].aval.shape
    return Value(graph.add("Where", [which, true, false]), shape, narrow=narrow)


def _rsqrt(graph: Graph, _: Any, inputs: list[Value]) -> str:
    return graph.add("Reciprocal", [graph.add("Sqrt", [graph.expanded(inputs[0])])])


def _is_finite(graph: Graph, _: Any, inputs: list[Value]) -> str:
    x = graph.expanded(inputs[0])
    return graph.add("Not", [graph.add("Or", [graph.add("IsInf", [x]), graph.add("IsNaN", [x])])])


def _cast(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"]))
    (x,) = inputs
    return Value(graph.add("Cast", [graph.broadcastable(x)], to=kind), x.shape, narrow=x.narrow)


def _broadcast(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    """Puts the axes in their places; the operator that reads the result broadcasts them."""
    (x,), shape = inputs[:1], equation.outvars[0].aval.shape
    places = equation.params["broadcast_dimensions"]
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


def _reduce(operator: str) -> Callable:
    def add_reduction(graph: Graph, equation: Any, inputs: list[Value]) -> str:
        axes = graph.integers(*equation.params["axes"])
        # By default, ONNX keeps reduced axes as 1.
        return graph.add(operator, [graph.expanded(inputs[0]), axes], keepdims=0)

    return add_reduction


def _concatenate(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    return graph.add("Concat", map(graph.expanded, inputs), axis=equation.params["dimension"])


def _stack(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    axis = equation.params["axis"]
    parts = [graph.add("Unsqueeze", [graph.expanded(x), graph.integers(axis)]) for x in inputs]
    return graph.add("Concat", parts, axis=axis)


def _matmul(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    (left, right), batched = equation.params["dimension_numbers"]
    x, kernel = inputs
    # MatMul needs no transposition if features come last and the kernel is [in, out].
    if (left, right, batched) != ((len(x.shape) - 1,), (0,), ((), ())):
        raise NotImplementedError(
            f"no ONNX for a product of {x.shape} and {kernel.shape} over {left}, {right}"
        )
    return graph.add("MatMul", [graph.expanded(x), graph.expanded(kernel)])


def _convolution(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    params, (x, kernel) = equation.params, inputs
    numbers = params["dimension_numbers"]
    if (
        kernel.constant is None
        or set(params["lhs_dilation"]) != {1}
        or params["batch_group_count"] != 1
    ):
        raise NotImplementedError(
            "no ONNX for a convolution with lhs_dilation or batch_group_count, or whose kernel is "
            "not constant"
        )
    # The specs list JAX's axes in ONNX's order, [out, in, h, w] and [N, C, H, W]; argsort inverts
    # them. Kernels are transposed here, and maps in the graph.
    weights = graph.constant(np.transpose(kernel.constant, numbers.rhs_spec))
    nchw = graph.add("Transpose", [graph.expanded(x)], perm=numbers.lhs_spec)
    result = graph.add(
        "Conv",
        [nchw, weights],
        strides=params["window_strides"],
        pads=_ends(params["padding"]),
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return graph.add("Transpose", [result], perm=np.argsort(numbers.out_spec).tolist())


def _pool(graph: Graph, equation: Any, x: Value, operator: str, **attributes: Any) -> str:
    """Pools over the two middle axes of NHWC."""
    params = equation.params
    if {*params["base_dilation"], *params["window_dilation"]} != {1}:
        raise NotImplementedError("no ONNX for a pool with base_dilation or window_dilation")
    windows = {
        "kernel_shape": params["window_dimensions"][1:3],
        "strides": params["window_strides"][1:3],
        "pads": _ends(params["padding"][1:3]),
    }
    nchw = graph.add("Transpose", [graph.expanded(x)], perm=[0, 3, 1, 2])
    result = graph.add(operator, [nchw], **windows, **attributes)
    return graph.add("Transpose", [result], perm=[0, 2, 3, 1])


def _max_pool(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    return _pool(graph, equation, inputs[0], "MaxPool")


def _sum_pool(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    # ONNX has no pool that sums. With the padding counted, the mean is over the whole window.
    mean = _pool(graph, equation, inputs[0], "AveragePool", count_include_pad=1)
    count = np.float32(np.prod(equation.params["window_dimensions"]))
    return graph.add("Mul", [mean, graph.constant(count)])


def _ends(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Returns all beginnings, then all ends, as ONNX takes them."""
    return [low for low, _ in padding] + [high for _, high in padding]


_OPERATORS = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "dot_general": _matmul,
    "is_finite": _is_finite,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _sum_pool,
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
}
