"""--mode=prepare: turns a source of patches into a decoded store."""

import time

from ml_collections import ConfigDict
from rich.console import Console

from bef_jax.data import store
from bef_jax.runtime import distributed
from bef_jax.runtime.progress import Phases


def prepare_or_verify(config: ConfigDict, verify: bool) -> dict:
    """Writes the store that `config.data` names, unless it exists, and returns its summary.

    Args:
        config: the whole configuration; only config.data matters.
        verify: reads the store back and compares every file with its checksum.

    Returns:
        The summary: mode, store, counts, positive_fraction (of two classes), class_counts,
        patch_size, mpp, groups, duplicates, content, verified, wall_seconds.

    Raises:
        UserError: see `store.prepare` and `store.verify`.
    """
    start = time.perf_counter()
    manifest = prepare_with_progress(config.data)
    if verify:
        with _phases() as phases:
            store.verify(store.store_path(config.data), phases.begin)
    counts, classes = manifest["counts"], manifest["classes"]
    class_counts = {
        split: dict(zip(classes, numbers, strict=True))
        for split, numbers in manifest["class_counts"].items()
    }
    return {
        "mode": "prepare",
        "store": str(store.store_path(config.data)),
        "counts": counts,
        # A source may have no test split.
        "positive_fraction": {
            split: class_counts[split][classes[1]] / count if count and len(classes) == 2 else None
            for split, count in counts.items()
        },
        "class_counts": class_counts,
        "patch_size": manifest["patch_size"],
        "mpp": manifest["mpp"],
        "groups": manifest["groups"],
        "duplicates": manifest["duplicates"],
        "content": manifest["content"],
        "verified": verify,
        "wall_seconds": time.perf_counter() - start,
    }


def prepare_with_progress(data: ConfigDict) -> dict:
    """Calls `store.prepare`, and shows on stderr what it does and how far it is.

    If there are several processes, the first one runs alone before the others. These then find its
    store, or make their own if each host has its own disk.
    """
    with distributed.first_alone("store"), _phases() as phases:
        return store.prepare(data, phases.begin)


def _phases() -> Phases:
    # Progress goes to stderr, because the summary must be the only line on stdout.
    return Phases(Console(stderr=True, quiet=not distributed.is_first()))
