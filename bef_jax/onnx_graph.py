"""A traced function becomes an ONNX graph: one translation for each primitive of inference.

Of a jaxpr, not of a network: whatever the registry holds is made of the same two dozen primitives.
What depends on weights alone is computed here, so that the file has no arithmetic on constants.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import onnx
from jax.extend.core import Literal
from onnx import helper, numpy_helper

OPSET = 18  # the first whose reductions all take axes as an input

_SAME_SHAPE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min",
    "logistic": "Sigmoid", "exp": "Exp", "log": "Log", "tanh": "Tanh", "sqrt": "Sqrt",
    "neg": "Neg", "abs": "Abs", "sign": "Sign",
}  # fmt: skip
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr",
          "custom_vjp_call": "call_jaxpr"}  # fmt: skip
_NCHW, _NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


class Unsupported(Exception):
    """A primitive, or a use of it, that has no translation here."""


def to_onnx(function: Callable, image: jax.ShapeDtypeStruct, outputs: Sequence[str]) -> bytes:
    """Translates `function(image)`, which returns one array for each name of `outputs`.

    Args:
        image: shape and dtype of the argument; its first size may be symbolic, and is `n` in ONNX.

    Returns:
        A serialised ONNX model with the input `image`.

    Raises:
        Unsupported: the function has a primitive that is not translated.
    """
    traced = jax.make_jaxpr(function)(image)
    graph = _Graph()
    results = graph.run(traced.jaxpr, traced.consts, ["image"])
    for name, result in zip(outputs, results, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name_of(result)], [name]))
    body = helper.make_graph(
        graph.nodes,
        "bef_jax",
        [_info("image", traced.in_avals[0])],
        [_info(*pair) for pair in zip(outputs, traced.out_avals, strict=True)],
        graph.weights,
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(body, opset_imports=[opset], ir_version=9, producer_name="bef_jax")
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _info(name: str, aval: jax.core.ShapedArray) -> onnx.ValueInfoProto:
    shape = [size if isinstance(size, int) else "n" for size in aval.shape]
    return helper.make_tensor_value_info(name, _type(aval.dtype), shape)


def _type(dtype: np.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


class _Graph:
    """Nodes and weights so far. A value is an array that is known by now, or a tensor's name."""

    def __init__(self):
        self.nodes, self.weights = [], []

    def run(self, jaxpr, consts: Sequence, arguments: Sequence) -> list:
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)
        for equation in jaxpr.eqns:
            inputs = [_read(values, atom) for atom in equation.invars]
            values |= zip(equation.outvars, self._translate(equation, inputs), strict=True)
        return [_read(values, atom) for atom in jaxpr.outvars]

    def _translate(self, equation, inputs: list) -> list:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            # The branch for platforms that are not named: XLA's own, grouped convolution, which
            # is what ONNX has, too.
            return [np.int32(params["platforms"].index(None))]
        if name == "cond":
            branch = params["branches"][int(inputs[0])]
            return self.run(branch.jaxpr, branch.consts, inputs[1:])
        if name in _CALLS:
            called = params[_CALLS[name]]
            return self.run(called.jaxpr, called.consts, inputs)
        if not any(isinstance(value, str) for value in inputs) and _is_static(equation.outvars):
            result = equation.primitive.bind(*map(np.asarray, inputs), **params)
            return list(result) if equation.primitive.multiple_results else [result]
        if name in _SAME_SHAPE:
            return [self.node(_SAME_SHAPE[name], *inputs)]
        if name not in _TRANSLATIONS:
            raise Unsupported(f"ONNX: the primitive {name} is not translated")
        return [_TRANSLATIONS[name](self, equation, *inputs)]

    def node(self, operator: str, *inputs, **attributes) -> str:
        """Adds a node with one output, and returns the output's name."""
        output = f"t{len(self.nodes)}"
        names = [self.name_of(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [output], **attributes))
        return output

    def name_of(self, value) -> str:
        """The tensor's name; an array becomes a weight of the model."""
        if isinstance(value, str):
            return value
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _read(values: dict, atom):
    return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else values[atom]


def _is_static(variables: Sequence) -> bool:
    return all(isinstance(size, int) for v in variables for size in v.aval.shape)


# ---- translations: (graph, equation, *inputs) -> name -------------------------------------------


def _shape(sizes: Sequence) -> np.ndarray:
    """For Reshape: -1 is what is left, the symbolic size."""
    return np.array([size if isinstance(size, int) else -1 for size in sizes], np.int64)


def _reshape(graph: _Graph, equation, x) -> str:
    return graph.node("Reshape", x, _shape(equation.outvars[0].aval.shape))


def _broadcast(graph: _Graph, equation, x, *_) -> str:
    shape, dimensions = equation.params["shape"], equation.params["broadcast_dimensions"]
    aligned = [1] * len(shape)
    for dimension, size in zip(dimensions, equation.invars[0].aval.shape, strict=True):
        aligned[dimension] = size
    x = graph.node("Reshape", x, _shape(aligned))
    grown = [
        1 if old == new or not isinstance(new, int) else new
        for old, new in zip(aligned, shape, strict=True)
    ]
    # Expand goes by the larger of both sizes, so that a 1 keeps the symbolic one. What is to grow
    # along the batch stays 1 there: arithmetic broadcasts it.
    return x if math.prod(grown) == 1 else graph.node("Expand", x, np.array(grown, np.int64))


def _convolution(graph: _Graph, equation, x, kernel) -> str:
    params = equation.params
    numbers = params["dimension_numbers"]
    known = (numbers.lhs_spec, numbers.rhs_spec) == (_NCHW, (3, 2, 0, 1))
    if not known or params["batch_group_count"] != 1 or params["lhs_dilation"] != (1, 1):
        raise Unsupported("ONNX: only NHWC convolutions with HWIO kernels are translated")
    before, after = zip(*params["padding"], strict=True)
    y = graph.node(
        "Conv",
        graph.node("Transpose", x, perm=_NCHW),
        np.asarray(kernel).transpose(3, 2, 0, 1),
        strides=params["window_strides"],
        pads=[*before, *after],
        group=params["feature_group_count"],
        dilations=params["rhs_dilation"],
    )
    return graph.node("Transpose", y, perm=_NHWC)


def _product(graph: _Graph, equation, x, y) -> str:
    (contracted, batch), rank = equation.params["dimension_numbers"], equation.invars[0].aval.ndim
    if (tuple(map(tuple, contracted)), batch) != (((rank - 1,), (0,)), ((), ())):
        raise Unsupported("ONNX: only products of a last with a first dimension are translated")
    return graph.node("MatMul", x, y)


def _pool(graph: _Graph, equation, x, operator: str) -> str:
    params = equation.params
    before, after = zip(*params["padding"][1:3], strict=True)
    y = graph.node(
        operator,
        graph.node("Transpose", x, perm=_NCHW),
        kernel_shape=params["window_dimensions"][1:3],
        strides=params["window_strides"][1:3],
        pads=[*before, *after],
        **({"count_include_pad": 1} if operator == "AveragePool" else {}),
    )
    return graph.node("Transpose", y, perm=_NHWC)


def _sum_pool(graph: _Graph, equation, x) -> str:
    # ONNX has means alone.
    size = np.float32(math.prod(equation.params["window_dimensions"]))
    return graph.node("Mul", _pool(graph, equation, x, "AveragePool"), size)


def _reduce(graph: _Graph, equation, x, operator: str) -> str:
    return graph.node(operator, x, np.array(equation.params["axes"], np.int64), keepdims=0)


def _slice(graph: _Graph, equation, x) -> str:
    params, sizes = equation.params, equation.invars[0].aval.shape
    axes = [axis for axis, size in enumerate(sizes) if isinstance(size, int)]
    strides = params["strides"] or [1] * len(sizes)
    bounds = (params["start_indices"], params["limit_indices"], range(len(sizes)), strides)
    first, last, which, step = (np.array([row[a] for a in axes], np.int64) for row in bounds)
    return graph.node("Slice", x, first, last, which, step)


def _stack(graph: _Graph, equation, *xs) -> str:
    axis = np.array([equation.params["axis"]], np.int64)
    parts = [graph.node("Unsqueeze", x, axis) for x in xs]
    return graph.node("Concat", *parts, axis=int(axis[0]))


_TRANSLATIONS: dict[str, Callable] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _convolution,
    "dot_general": _product,
    "reduce_window_max": lambda g, e, x: _pool(g, e, x, "MaxPool"),
    "reduce_window_sum": _sum_pool,
    "reduce_sum": lambda g, e, x: _reduce(g, e, x, "ReduceSum"),
    "reduce_max": lambda g, e, x: _reduce(g, e, x, "ReduceMax"),
    "slice": _slice,
    "concatenate": lambda g, e, *xs: g.node("Concat", *xs, axis=e.params["dimension"]),
    "transpose": lambda g, e, x: g.node("Transpose", x, perm=e.params["permutation"]),
    "convert_element_type": lambda g, e, x: g.node("Cast", x, to=_type(e.params["new_dtype"])),
    "square": lambda g, e, x: g.node("Mul", x, x),
    "is_finite": lambda g, e, x: g.node("Less", g.node("Abs", x), np.float32(np.inf)),
    "select_n": lambda g, e, which, no, yes: g.node("Where", which, yes, no),
    "stack": _stack,
    "stop_gradient": lambda g, e, x: x,
}
