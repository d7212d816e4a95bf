"""--mode=prepare: a source of patches becomes a decoded store."""

import time

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bef_jax import distributed
from bef_jax.data import store


def run(config: ConfigDict, verify: bool) -> dict:
    """Writes the store that `config.data` names, unless it is there, and describes it.

    Args:
        config: the whole configuration; only config.data matters.
        verify: reads the store back and compares every file with its checksum.

    Returns:
        The summary: mode, store, counts, positive_fraction, duplicates, content, verified,
        wall_seconds.

    Raises:
        UserError: see `store.prepare` and `store.verify`.
    """
    start = time.perf_counter()
    manifest = prepare_with_progress(config.data)
    if verify:
        store.verify(store.store_path(config.data))
    counts, classes = manifest["counts"], manifest["class_counts"]
    return {
        "mode": "prepare",
        "store": str(store.store_path(config.data)),
        "counts": counts,
        # A source may have no test split.
        "positive_fraction": {
            split: classes[split][1] / count if count else None for split, count in counts.items()
        },
        "duplicates": manifest["duplicates"],
        "content": manifest["content"],
        "verified": verify,
        "wall_seconds": time.perf_counter() - start,
    }


def prepare_with_progress(data: ConfigDict) -> dict:
    """Calls `store.prepare`, showing on stderr how many patches of each split were read.

    Of several processes the first does so before the others, which then find its store, or, if
    each host has a disk of its own, make theirs.
    """
    with distributed.first_alone("store"):
        return _prepare(data)


def _prepare(data: ConfigDict) -> dict:
    # A count, no bar: sources do not say beforehand how many patches they have.
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    tasks = {}
    # On stderr: the summary is the only line on stdout.
    with Progress(*columns, console=Console(stderr=True, quiet=not distributed.is_first())) as bar:

        def show(split: str, count: int) -> None:
            # A line once its split comes: there may be no test.
            if split not in tasks:
                tasks[split] = bar.add_task("")
            bar.update(tasks[split], description=f"prepare {split}: {count:,} patches")

        return store.prepare(data, show)
