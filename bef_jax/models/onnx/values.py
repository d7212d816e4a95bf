"""Tensors of an ONNX graph that is being built, and the axes that they have.

JAX's maps are [N, H, W, C] here, and its vectors [N, C]. ONNX has convolutions and pooling with the
channels first only. So a convolution's result, and what is computed from it elementwise, stays
[N, C, H, W], and a vector that is pooled from it [N, C, 1, 1]. Then a network needs no
transposition between its first convolution and its classifier, and a runtime can fuse what follows
a convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

_TO_FIRST, _TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # orders of axes for a transposition


@dataclass(frozen=True)
class Value:
    """The tensor in the graph that stands for a variable of a jaxpr.

    Attributes:
        name: of the tensor.
        shape: the one that JAX gives it; the batch is symbolic.
        constant: its content, with JAX's axes, if that does not depend on the input.
        narrow: whether it has axes of 1 where `shape` is larger, and relies on broadcasting.
        channels_first: whether the tensor is [N, C, H, W] where `shape` is [N, H, W, C], or
            [N, C, 1, 1] where `shape` is [N, C].
    """

    name: str
    shape: tuple
    constant: np.ndarray | None = None
    narrow: bool = False
    channels_first: bool = False


@dataclass
class Graph:
    """The nodes and constants that were added so far."""

    nodes: list = field(default_factory=list)
    initializers: list = field(default_factory=list)
    # Of each Clip: what it clips, and its bounds, by Max and Min.
    clips: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    # Of each sum over the positions of a map: its mean, and how many positions there are.
    means: dict[str, tuple[str, np.float32]] = field(default_factory=dict)
    _constant_names: dict = field(default_factory=dict)
    _moved: dict = field(default_factory=dict)  # (name, how) -> the same tensor with other axes

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
        if value.constant is not None:
            return self.constant(value.constant)
        if not value.channels_first:
            return value.name
        if len(value.shape) == 2:
            return self._move(value.name, "Squeeze", self.integers(2, 3))
        return self._move(value.name, "Transpose", perm=_TO_LAST)

    def expanded(self, value: Value) -> str:
        """Returns the name of a tensor that has the value's shape."""
        name = self.broadcastable(value)
        if not value.narrow:
            return name
        # 1 stands for the batch, because Expand leaves a larger axis as it is.
        sizes = [size if isinstance(size, int) else 1 for size in value.shape]
        return self.add("Expand", [name, self.integers(*sizes)])

    def channels_first(self, value: Value) -> str:
        """Returns the name of a tensor [N, C, H, W] or [N, C, 1, 1] that broadcasts so."""
        if value.constant is not None:
            return self.constant(_channels_first(value.constant))
        if value.channels_first:
            return value.name
        if len(value.shape) == 2:
            return self._move(value.name, "Unsqueeze", self.integers(2, 3))
        return self._move(value.name, "Transpose", perm=_TO_FIRST)

    def _move(self, name: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node that only moves the axes of a tensor, unless an equal one is there."""
        if (name, operator) not in self._moved:
            self._moved[name, operator] = self.add(operator, [name, *inputs], **attributes)
        return self._moved[name, operator]


def known(array: Any) -> Value:
    """Returns a constant's value."""
    array = np.asarray(array)
    return Value("", array.shape, array)


def _channels_first(constant: np.ndarray) -> np.ndarray:
    """Returns a constant [N, H, W, C], [N, C] or [] with the channels first."""
    if constant.ndim == 0:
        return constant
    return constant.transpose(_TO_FIRST) if constant.ndim == 4 else constant[:, :, None, None]
