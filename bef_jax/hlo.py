"""Reads what XLA made of a program: its text after optimisation, `compiled.as_text()`."""

import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_BITS = {"pred": 8}  # the other types have theirs in their names: f32, bf16, u8, s4
# Text is the one public form of a compiled program; what changes in it between versions of XLA is
# in these patterns.
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
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
    for kind, size, times in _walk(bodies, entry, 1):
        sums = found.setdefault(kind, {"count": 0, "bytes": 0})
        sums["count"] += times
        sums["bytes"] += times * size
    return dict(sorted(found.items()))


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


def _walk(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int, int]]:
    """Yields (kind, bytes, times) of each collective that `name` and what it calls contain."""
    for line in bodies[name]:
        match = _COLLECTIVE.search(line)
        if match:
            # What stands between ` = ` and the operation's name is the type of its result.
            shape = line[: match.start()].partition(" = ")[2]
            yield match[1], _result_bytes(shape, bool(match[2]), match[1]), times
            continue  # what it applies adds two numbers up
        # In the loop's own line, where XLA found the count.
        trips = _TRIPS.search(line)
        inner = times * int(trips[1]) if trips else times
        for called in _called(line):
            yield from _walk(bodies, called, inner)


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
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_bytes(*array) for array in arrays)


def _bytes(dtype: str, dims: str) -> int:
    count = math.prod(int(size) for size in dims.split(",") if size)
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return count * bits // 8
