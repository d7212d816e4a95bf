"""Reads the text of a program as XLA has optimised it, from `compiled.as_text()`.

Text is the only public form of a compiled program. All that can change between versions of XLA is
in the patterns of this module.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

# Other types have their bits in their names: f32, bf16, u8, s4. A token only orders operations.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# Matches an array: its type, its shape and, if a TPU's layout names one, a memory other than the
# main one, such as S(1) in bf16[8,2]{1,0:S(1)}.
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_OPERATION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
# Matches an operand. One element of a tuple is an operation of its own, or %name#1, by version.
_OPERAND = re.compile(r"%([\w.\-]+)(?:#(\d+))?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Operations that do no work, but let all operations of another computation do theirs.
_CONTROL = ("while", "conditional", "call", "async-start")


class Array(NamedTuple):
    """An array or a scalar.

    Attributes:
        dtype: as XLA writes it, such as bf16.
        dims: its shape, such as 8,2; empty for a scalar.
        memory: the memory where it is, such as S(1); empty for main memory.
    """

    dtype: str
    dims: str
    memory: str

    @property
    def size(self) -> int:
        """Its bytes."""
        count = math.prod(int(size) for size in self.dims.split(",") if size)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(re.search(r"\d+", self.dtype)[0])
        return count * bits // 8


class Operand(NamedTuple):
    """The result of the operation `name`; with an index, only that element of a tuple."""

    name: str
    index: int | None


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of the text.

    Attributes:
        root: whether its result is that of its computation.
        shape: the text of its result's type.
        kind: what it does, such as fusion.
        rest: what follows the bracket after `kind`: operands, then attributes.
    """

    root: bool
    name: str
    shape: str
    kind: str
    rest: str

    @property
    def arrays(self) -> list[Array]:
        """The arrays of its result, which may be a tuple."""
        return [Array(*parts) for parts in _ARRAY.findall(self.shape)]

    @property
    def operands(self) -> list[Operand]:
        """What it reads, in order."""
        found = _OPERAND.findall(self.rest.partition(")")[0])
        return [Operand(name, int(index) if index else None) for name, index in found]

    @property
    def collective(self) -> str | None:
        """The kind of a collective, the same if it only starts here; None for what is none."""
        kind = self.kind.removesuffix("-start")
        return kind if kind in KINDS else None

    @property
    def number(self) -> int:
        """The position of a parameter."""
        return int(self.rest.partition(")")[0])

    @property
    def called(self) -> list[str]:
        """The computations that it calls, with all branches, although only one of them runs."""
        branches = _BRANCHES.search(self.rest)
        names = branches[1].split(",") if branches else []
        return _CALLED.findall(self.rest) + [name.strip().lstrip("%") for name in names]

    @property
    def turns(self) -> int | None:
        """How often a loop turns; None if XLA did not find out, or if it is no loop."""
        match = _TRIPS.search(self.rest)
        return int(match[1]) if match else None


Computation = dict[str, Operation]  # its operations by name


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a module by name, and the name of the one that starts."""

    computations: dict[str, Computation]
    entry: str

    def walk(self, fused: bool) -> Iterator[tuple[Operation, Computation, int]]:
        """Yields each operation of one run, with its computation and how often it runs.

        Args:
            fused: whether to go into fusions, too. Without it, a fusion is one operation.
        """
        yield from self._walk(self.entry, fused, times=1)

    def _walk(self, name: str, fused: bool, times: int) -> Iterator:
        computation = self.computations[name]
        for operation in computation.values():
            yield operation, computation, times
            # Skip what a collective calls: it adds two numbers, or is the same collective again.
            if operation.kind in _CONTROL or (fused and not operation.collective):
                turns = 1 if operation.turns is None else operation.turns
                for called in operation.called:
                    yield from self._walk(called, fused, times * turns)


def read(text: str) -> Program:
    """Reads an optimised HLO module."""
    computations: dict[str, Computation] = {}
    entry, operations = "", {}
    for line in text.splitlines():
        # A computation's first line is not indented and ends in a brace; the others are indented.
        if match := _COMPUTATION.match(line):
            operations = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif match := _OPERATION.match(line):
            operations[match[2]] = Operation(bool(match[1]), *match.groups()[1:])
    return Program(computations, entry)
