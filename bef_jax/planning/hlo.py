"""Reads what XLA made of a program: its text after optimisation, `compiled.as_text()`."""

import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_BITS = {"pred": 8}  # the other types have theirs in their names: f32, bf16, u8, s4
# Text is the one public form of a compiled program; what changes in it between versions of XLA is
# in these patterns.
# Type, shape, and, of a TPU's layout, the memory where it is not the main one: bf16[8,2]{1,0:S(1)}.
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
# What only gives a name, or runs what is counted by itself.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|opt-barrier|while|conditional|call|.*-done"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# A -done has no bracket right after the kind, and so is not counted a second time.
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """How often one run of the program calls each kind of collective, and for how many bytes.

    What runs asynchronously, as a start and a done, counts once. What is in a loop counts as often
    as the loop turns, where XLA knows that, else once.

    Args:
        text: an optimised HLO module.

    Returns:
        {kind: {"count": calls, "bytes": of their results on one device}}, without kinds that do
        not occur.
    """
    bodies, entry = _computations(text)
    found: dict[str, dict[str, int]] = {}
    for line, _, times in _walk(bodies, entry, 1, fused=True):
        match = _COLLECTIVE.search(line)
        if match:
            sums = found.setdefault(match[1], {"count": 0, "bytes": 0})
            sums["count"] += times
            # What stands between ` = ` and the operation's name is the type of its result.
            shape = line[: match.start()].partition(" = ")[2]
            sums["bytes"] += times * _result_bytes(shape, bool(match[2]), match[1])
    return dict(sorted(found.items()))


def hbm_bytes(text: str) -> int:
    """Bytes that one run of a TPU program moves from and to a device's main memory.

    XLA's own count has what operations read and write in on-chip memory, too, and the copies
    there and back as both: of B3 on v5e it is four times this. An array that an operation reads in
    part counts as a whole, and of branches all count, although one runs: this may be too much.

    Args:
        text: an optimised HLO module, scheduled, so that its layouts name the memory.
    """
    bodies, entry = _computations(text)
    types = {name: _types(lines) for name, lines in bodies.items()}
    lines = _walk(bodies, entry, 1, fused=False)
    return sum(times * _moved(line, types[name]) for line, name, times in lines)


def _types(lines: list[str]) -> dict[str, str]:
    """The type of each operation's result, by the operation's name."""
    matches = (_OPERATION.match(line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def _moved(line: str, types: dict[str, str]) -> int:
    """Bytes that the operation of a line itself moves from and to main memory.

    Args:
        types: of the results of its computation's operations, its operands among them.
    """
    match = _OPERATION.match(line)
    if not match or _FREE.fullmatch(match[3]):
        return 0
    _, result, kind, rest = match.groups()
    operands = set(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
    if kind in ("copy-start", "slice-start"):
        # ((source), destination) or (destination, source): what is smaller is what is copied.
        sides = [array for array in _ARRAY.findall(result) if array[1]]
        copied = min((_bytes(*array) for array in sides), default=0)
        return copied * sum(not array[2] for array in sides)
    arrays = [result, *(types.get(name, "") for name in operands)]
    return sum(_main_memory_bytes(array) for array in arrays)


def _main_memory_bytes(shape: str) -> int:
    return sum(_bytes(*array) for array in _ARRAY.findall(shape) if not array[2])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of that where the program starts."""
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        # A computation's first line ends in a brace at no indent; its operations are indented.
        match = _COMPUTATION.match(line)
        if match:
            lines = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        lines.append(line)
    return bodies, entry


def _walk(
    bodies: dict[str, list[str]], name: str, times: int, fused: bool
) -> Iterator[tuple[str, str, int]]:
    """Yields each line that `name` and what it calls run, its computation, and how often it runs.

    Args:
        fused: also the lines of a fusion, between which nothing goes to memory.
    """
    for line in bodies[name]:
        yield line, name, times
        # What a collective calls adds two numbers up.
        if _COLLECTIVE.search(line) or (not fused and " fusion(" in line):
            continue
        # In the loop's own line, where XLA found the count.
        trips = _TRIPS.search(line)
        inner = times * int(trips[1]) if trips else times
        for called in _called(line):
            yield from _walk(bodies, called, inner, fused)


def _called(line: str) -> list[str]:
    # All branches are walked, although one runs: an upper bound.
    branches = _BRANCHES.search(line)
    names = branches[1].split(",") if branches else []
    return _CALLED.findall(line) + [name.strip().lstrip("%") for name in names]


def _result_bytes(shape: str, started: bool, kind: str) -> int:
    """Bytes of an array or a tuple of them.

    A start yields operands, as many results, and scalars of its own; only all-reduce's yields its
    results alone.
    """
    arrays = _ARRAY.findall(shape)
    if started and kind != "all-reduce":
        arrays = [array for array in arrays if array[:2] != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_bytes(*array) for array in arrays)


def _bytes(dtype: str, dims: str, memory: str = "") -> int:
    count = math.prod(int(size) for size in dims.split(",") if size)
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return count * bits // 8
