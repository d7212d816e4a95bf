"""Translates a JAX function into an ONNX graph, as far as the networks here need for inference.

jax2onnx translates far more, but it limits Orbax to versions below the one that checkpoints here
need. An unknown primitive is refused by name, never guessed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper

from bef_jax import __version__
from bef_jax.models.onnx.operators import OPERATORS
from bef_jax.models.onnx.values import Graph, Value, known

OPSET = 18  # from 2022; since then, reductions take their axes as an input
IR_VERSION = 9  # older runtimes refuse newer ones


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
    results = _run(graph, closed.jaxpr, list(map(known, closed.consts)), [image])
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
    nodes = _read_nodes(graph.nodes, set(output_names))
    content = helper.make_graph(nodes, "bef_jax", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    made_by = {"producer_name": "bef_jax", "producer_version": __version__}
    model = helper.make_model(content, opset_imports=opsets, ir_version=IR_VERSION, **made_by)
    # ONNX has metadata as text only.
    helper.set_model_props(model, {name: json.dumps(fact) for name, fact in (facts or {}).items()})
    # An invalid file fails here, and not on a server.
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _read_nodes(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Returns the nodes whose results are read: a Clip that went into another one is not."""
    found = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted = wanted | set(node.input)
            found.append(node)
    return found[::-1]


def _run(graph: Graph, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
    """Adds a jaxpr's equations, and returns its results."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(atom: Any) -> Value:
        return known(atom.val) if hasattr(atom, "val") else values[atom]

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
        return _run(graph, called.jaxpr, [known(const) for const in called.consts], inputs)
    if name == "platform_index":
        return [known(np.int32(0))]  # it only chooses a branch, which `_called` does
    # A result that depends on weights only is computed now, and becomes a constant. That can't be
    # done if the batch is in the shape, because its size is not known yet.
    if all(value.constant is not None for value in inputs) and _is_concrete(shapes):
        results = equation.primitive.bind(*(v.constant for v in inputs), **equation.params)
        return [known(x) for x in (results if equation.primitive.multiple_results else [results])]
    if name not in OPERATORS:
        raise NotImplementedError(f"{name} is not among the operators that can be exported to ONNX")
    result = OPERATORS[name](graph, equation, inputs)
    return [result if isinstance(result, Value) else Value(result, shapes[0])]


def _called(equation: Any) -> Any:
    """Returns the closed jaxpr that an equation calls, or None; of a cond, the default branch."""
    params = equation.params
    if equation.primitive.name == "cond":
        return params["branches"][-1]  # where `lax.platform_dependent` puts its default
    return params.get("call_jaxpr", params.get("jaxpr"))


def _is_concrete(shapes: list[tuple]) -> bool:
    return all(isinstance(size, int) for shape in shapes for size in shape)
