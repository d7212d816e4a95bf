"""Reads the text of a program as XLA has optimised it, from `compiled.as_text()`."""

import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

# Other types have their bits in their names: f32, bf16, u8, s4. A token only orders operations.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# Text is the only public form of a compiled program. All that can change between versions of XLA is
# in these patterns.
# Matches an array: its type, its shape and, if a TPU's layout names one, a memory other than the
# main one, such as S(1) in bf16[8,2]{1,0:S(1)}.
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
# Operations that only give a name, or that call code which is counted separately.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|opt-barrier|while|conditional|call|.*-done"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# A -done has no bracket right after the kind, so it is not counted a second time.
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Counts the calls of each kind of collective in one run of the program, and their bytes.

    An asynchronous one, which is a start and a done, counts once. One in a loop counts as often as
    the loop turns if XLA knows that, else once.

    Args:
        text: an optimised HLO module.

    Returns:
        {kind: {"count": calls, "bytes": bytes of their results on one device}}, without kinds that
        do not occur.
    """
    bodies, entry = _computations(text)
    found: dict[str, dict[str, int]] = {}
    for line, _, times in _walk(bodies, entry, fused=True):
        match = _COLLECTIVE.search(line)
        if match:
            sums = found.setdefault(match[1], {"count": 0, "bytes": 0})
            sums["count"] += times
            # The type of the result is between ` = ` and the operation's name.
            shape = line[: match.start()].partition(" = ")[2]
            sums["bytes"] += times * _result_bytes(shape, bool(match[2]), match[1])
    return dict(sorted(found.items()))


def hbm_traffic(text: str) -> int:
    """Returns the bytes that one run of a TPU program moves from and to a device's main memory.

    XLA's own count also has what operations read and write in on-chip memory. It counts a copy
    between the two memories as a read and a write. For B3 on v5e it is four times this. This count
    may be too high: an array that is read in part counts as a whole, and all branches count
    although only one runs.

    Args:
        text: an optimised HLO module; it is scheduled, so that its layouts name the memory.
    """
    bodies, entry = _computations(text)
    types = {name: _types(lines) for name, lines in bodies.items()}
    lines = _walk(bodies, entry, fused=False)
    return sum(times * _moved(line, types[name]) for line, name, times in lines)


def _types(lines: list[str]) -> dict[str, str]:
    """Returns the type of each operation's result, by the operation's name."""
    matches = (_OPERATION.match(line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def _moved(line: str, types: dict[str, str]) -> int:
    """Returns the bytes that the operation of a line itself moves from and to main memory.

    Args:
        types: {operation: type of its result} of the same computation, so operands are in it.
    """
    match = _OPERATION.match(line)
    if not match or _FREE.fullmatch(match[3]):
        return 0
    _, result, kind, rest = match.groups()
    operands = set(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
    if kind in ("copy-start", "slice-start"):
        # ((source), destination) or (destination, source), and scalars, which are not counted. The
        # smaller of the two is copied. It counts once for each of them that is in main memory.
        sides = [(dtype, dims, memory) for dtype, dims, memory in _ARRAY.findall(result) if dims]
        copied = min((_bytes(*side) for side in sides), default=0)
        return copied * sum(not memory for _, _, memory in sides)
    arrays = [result, *(types.get(name, "") for name in operands)]
    return sum(_main_memory_bytes(array) for array in arrays)


def _main_memory_bytes(shape: str) -> int:
    arrays = _ARRAY.findall(shape)
    return sum(_bytes(dtype, dims) for dtype, dims, memory in arrays if not memory)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the name of the entry computation."""
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        # A computation's first line is not indented and ends in a brace; the others are indented.
        match = _COMPUTATION.match(line)
        if match:
            lines = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        lines.append(line)
    return bodies, entry


def _walk(
    bodies: dict[str, list[str]], name: str, fused: bool, times: int = 1
) -> Iterator[tuple[str, str, int]]:
    """Yields (line, computation, how often it runs) for `name` and all that it calls.

    Args:
        fused: whether to yield the lines of a fusion too; nothing goes to memory between them.
    """
    for line in bodies[name]:
        yield line, name, times
        # Skip what a collective calls, because that only adds two numbers.
        if _COLLECTIVE.search(line) or (not fused and " fusion(" in line):
            continue
        # The line of a loop has its number of turns, if XLA found it.
        trips = _TRIPS.search(line)
        inner = times * int(trips[1]) if trips else times
        for called in _called(line):
            yield from _walk(bodies, called, fused, inner)


def _called(line: str) -> list[str]:
    # Walk all branches although only one runs, which gives an upper bound.
    branches = _BRANCHES.search(line)
    names = branches[1].split(",") if branches else []
    return _CALLED.findall(line) + [name.strip().lstrip("%") for name in names]


def _result_bytes(shape: str, started: bool, kind: str) -> int:
    """Returns the bytes of a collective's result, an array or a tuple of arrays.

    The start of an all-reduce yields only its results. Any other start yields its operands, then
    the same number of results, and u32 scalars.
    """
    arrays = _ARRAY.findall(shape)
    if started and kind != "all-reduce":
        arrays = [array for array in arrays if array[:2] != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_bytes(*array) for array in arrays)


def _bytes(dtype: str, dims: str, memory: str = "") -> int:
    count = math.prod(int(size) for size in dims.split(",") if size)
    bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
    return count * bits // 8
