"""The command: python -m tests.fuzz [--count=10000] [--seed=0] [--entry=npz]."""

import argparse
import resource
import sys
import time
from collections import Counter

from tests.fuzz.entries import ENTRIES
from tests.fuzz.run import CORPUS, limit_memory, try_seed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10000, help="inputs over all entry points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entry", choices=ENTRIES, help="only this one")
    arguments = parser.parse_args()
    names = [arguments.entry] if arguments.entry else list(ENTRIES)
    for name in names:  # makes what is cached, before memory is limited
        try_seed(name, arguments.seed)
    limit_memory()
    each = -(-arguments.count // len(names))  # at least as many as were asked for
    failures = sum(fuzz(name, each, arguments.seed) for name in names)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{failures} failed; ru_maxrss of the last input {most} MiB")
    return 1 if failures else 0


def fuzz(entry: str, count: int, seed: int) -> int:
    """Tries `count` inputs, prints the counts, and returns how many failed."""
    outcomes, slowest, highest = Counter(), (0.0, seed), (0, seed)
    for number in range(seed, seed + count):
        began = time.monotonic()
        verdict = try_seed(entry, number, keep=CORPUS)
        slowest = max(slowest, (time.monotonic() - began, number))
        highest = max(highest, (verdict.peak, number))
        outcomes[verdict.outcome] += 1
        if verdict.outcome == "failed":
            print(verdict.said, file=sys.stderr)
    print(
        f"{entry:14} {dict(sorted(outcomes.items()))}, "
        f"slowest {slowest[0]:.1f} s (seed {slowest[1]}), "
        f"highest peak {highest[0] >> 20} MiB (seed {highest[1]})",
        flush=True,
    )
    return outcomes["failed"]


if __name__ == "__main__":
    sys.exit(main())
