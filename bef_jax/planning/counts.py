"""Counts what a compiled program does, in the text of it: collectives, bytes and kernels.

Of a loop, every turn counts if XLA knows how many there are (`turns_known`), else one. All branches
count, although only one of them runs.
"""

import math
import re
from collections import ChainMap

from bef_jax.planning.hlo import Array, Computation, Operand, Operation, Program

# Operations that only give a name, or that end or call what is counted elsewhere.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|opt-barrier|after-all|while|conditional|"
    "call|async-start|.*-update|.*-done"
)
# Operations that read no more of their first operand than they return.
_SLICES = ("slice", "dynamic-slice", "gather")
# Puts its second operand into its first one, in place: the rest of the array is not touched.
_PUT = "dynamic-update-slice"
# A call of one of NVIDIA's libraries. The last part of its result may be room to work in: bytes.
_LIBRARY = re.compile(r'custom_call_target="__cu')


def collectives(program: Program) -> dict[str, dict[str, int]]:
    """Counts the calls of each kind of collective in one run of the program, and their bytes.

    An asynchronous one, which is a start and a done, counts once.

    Returns:
        {kind: {"count": calls, "bytes": bytes of their results on one device}}, without kinds that
        do not occur.
    """
    found: dict[str, dict[str, int]] = {}
    for operation, _, times in program.walk(fused=True):
        if operation.collective:
            sums = found.setdefault(operation.collective, {"count": 0, "bytes": 0})
            sums["count"] += times
            sums["bytes"] += times * sum(array.size for array in _results(operation))
    return dict(sorted(found.items()))


def kernels(program: Program) -> int:
    """Returns how many kernels one run of a GPU's program launches.

    A fusion is one kernel. A call of a library counts as one, too, but may launch several.
    """
    walk = program.walk(fused=False)
    return sum(times for operation, _, times in walk if not _FREE.fullmatch(operation.kind))


def hbm_traffic(program: Program) -> int:
    """Returns the bytes that one run of a program moves from and to a device's main memory.

    Each operation reads its operands once and writes its results once. Of an array from which it
    only takes slices or rows, just those count. So does a slice that it puts into an array. What a
    TPU keeps in on-chip memory does not count, because the layouts name the memory. XLA's own count
    has that too, and counts a copy between the two memories as a read and a write. For B3 on v5e it
    is four times this.

    This count may be too high, because it does not know what a GPU keeps in its caches.
    """
    walk = program.walk(fused=False)
    return sum(times * _moved(operation, scope, program) for operation, scope, times in walk)


def turns_known(program: Program) -> bool:
    """Returns whether XLA knows how often each loop of the program turns."""
    operations = (operation for operation, _, _ in program.walk(fused=False))
    loops = (operation for operation in operations if operation.kind == "while")
    return all(loop.turns is not None for loop in loops)


# ---- bytes of one operation ---------------------------------------------------------------------


def _moved(operation: Operation, scope: Computation, program: Program) -> int:
    """Returns the bytes that an operation itself moves from and to main memory.

    Args:
        scope: the computation that has the operation, and so its operands.
    """
    if _FREE.fullmatch(operation.kind):
        return 0
    if operation.kind in ("copy-start", "slice-start"):
        # ((source), destination) or (destination, source), and scalars, which are not counted. The
        # smaller of the two is copied. It counts once for each of them that is in main memory.
        sides = [array for array in operation.arrays if array.dims]
        copied = min((array.size for array in sides), default=0)
        return copied * sum(not array.memory for array in sides)
    inside = _inside(operation, program)
    return _bytes_read(operation, scope, inside) + _bytes_written(operation, scope, inside)


def _inside(operation: Operation, program: Program) -> Computation:
    """Returns the operations of a fusion; of any other operation, itself alone."""
    fused = operation.kind in ("fusion", "fusion-start")
    return program.computations[operation.called[0]] if fused else {operation.name: operation}


def _bytes_read(operation: Operation, scope: Computation, inside: Computation) -> int:
    parts = _parts_read(inside)
    # In a fusion, a parameter stands for each operand.
    parameters = {inner.number: name for name, inner in inside.items() if inner.kind == "parameter"}
    read: dict[Operand, float] = {}
    for position, operand in enumerate(operation.operands):
        arrays = scope[operand.name].arrays
        whole = _main_memory_bytes(arrays if operand.index is None else [arrays[operand.index]])
        part = parts.get(parameters.get(position, operand.name), math.inf)
        # An operand that is given twice counts once, because the bytes are the same.
        read[operand] = min(whole, read.get(operand, 0) + part)
    return sum(read.values())


def _parts_read(inside: Computation) -> dict[str, float]:
    """Returns the bytes that are read of each name; infinity if that is all of it."""
    parts: dict[str, float] = {}
    users = (inner for inner in inside.values() if inner.kind != "bitcast")
    for user in users:
        for position, operand in enumerate(user.operands):
            name = _source(operand.name, inside)
            parts[name] = parts.get(name, 0) + (math.inf if position else _part_read(user))
    return parts


def _part_read(operation: Operation) -> float:
    """Returns the bytes that an operation reads of its first operand; infinity for all of it."""
    if operation.kind in _SLICES:
        return sum(array.size for array in operation.arrays)
    return 0 if operation.kind == _PUT else math.inf


def _bytes_written(operation: Operation, scope: Computation, inside: Computation) -> int:
    arrays = _results(operation)
    library = any(_LIBRARY.search(inner.rest) for inner in inside.values())
    # The room is not read or written from one end to the other, and nothing tells how much it is.
    if library and len(arrays) > 1 and arrays[-1].dtype in ("s8", "u8"):
        arrays = arrays[:-1]
    root = next((inner for inner in inside.values() if inner.root), operation)
    names = [operand.name for operand in root.operands] if root.kind == "tuple" else [root.name]
    known = ChainMap(inside, scope)
    for position, name in enumerate(names):
        maker = known[_source(name, inside)]
        if maker.kind == _PUT:
            # Only the slice is written, and it goes to the memory of the array.
            (put,) = known[maker.operands[1].name].arrays
            arrays[position] = put._replace(memory=arrays[position].memory)
    return _main_memory_bytes(arrays)


def _source(name: str, inside: Computation) -> str:
    """Returns the name of the array that `name` is, if it is only another view of it."""
    while name in inside and inside[name].kind == "bitcast":
        name = inside[name].operands[0].name
    return name


def _main_memory_bytes(arrays: list[Array]) -> int:
    return sum(array.size for array in arrays if not array.memory)


def _results(operation: Operation) -> list[Array]:
    """Returns the arrays that an operation makes for others to read."""
    arrays, operands = operation.arrays, operation.operands
    # A start may yield its operands first, and u32 scalars last.
    if operation.kind.endswith("-start") and len(arrays) > len(operands):
        return [array for array in arrays[len(operands) :] if array[:2] != ("u32", "")]
    return arrays
