"""Measures how a store of PCam's size is written and read, and prints a line of JSON each.

    python results/store_reading.py make DIR --patches=SHARED/data/pcam     # 8 GB, some minutes
    python results/store_reading.py prepare DIR    # plain h5py, then prepare: makes DIR/store
    python results/store_reading.py cold DIR       # random batches from the disk, as root
    python results/store_reading.py warm DIR       # the same from memory, beside a memory map
    python results/store_reading.py near DIR       # the grids of the search for near duplicates

`make` repeats the real patches, each time turned and shifted, in chunks of 64 packed by gzip. What
is compared runs in turn. `cold` and `near` drop the kernel's cache of files before each run.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import jax
import numpy as np

from bef_jax.configs.default import get_config
from bef_jax.data import near_duplicates, store
from bef_jax.data.batches import put_batch
from bef_jax.data.store import Split
from bef_jax.runtime import sharding

COUNTS = {"test": 32_768, "valid": 32_768, "train": 262_144}
CHUNK = 64  # patches
ROW_BYTES = 96 * 96 * 3
BATCHES = 60


def images_file(folder: Path, split: str) -> Path:
    """Returns the file of a split's images, named as PCam's."""
    return folder / f"camelyonpatch_level_2_split_{split}_x.h5"


def make(folder: Path, patches: Path) -> None:
    """Writes HDF5 files with as many patches as PCam's."""
    spec = importlib.util.spec_from_file_location("pcam_subset", patches / "pcam_subset.py")
    subset = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(subset)
    images, labels, _ = subset.load("train")

    def packed(start: int) -> bytes:
        rows = range(start, start + CHUNK)
        return zlib.compress(np.stack([changed(*divmod(row, len(images))) for row in rows]), 1)

    def changed(times: int, row: int) -> np.ndarray:
        turned = np.rot90(images[row], times % 4)[:, :: -1 if times & 4 else 1]
        return np.roll(turned, (times, 2 * times), (0, 1))

    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for split, count in COUNTS.items():
        write(images_file(folder, split), packed, first, count)
        with h5py.File(str(images_file(folder, split)).replace("_x.", "_y."), "w") as file:
            rows = (first + np.arange(count)) % len(labels)
            file.create_dataset("y", data=labels[rows].reshape(-1, 1, 1, 1))
        first += count


def write(path: Path, packed: Callable[[int], bytes], first: int, count: int) -> None:
    """Writes `count` patches from number `first` on; two threads pack them."""
    options = {"chunks": (CHUNK, 96, 96, 3), "compression": "gzip", "compression_opts": 1}
    with h5py.File(path, "w") as file, ThreadPoolExecutor(2) as pool:
        x = file.create_dataset("x", (count, 96, 96, 3), np.uint8, **options)
        for block in range(0, count, 32 * CHUNK):
            starts = range(block, min(block + 32 * CHUNK, count), CHUNK)
            chunks = pool.map(packed, [first + start for start in starts])
            for start, chunk in zip(starts, chunks, strict=True):
                x.id.write_direct_chunk((start, 0, 0, 0), chunk)


def timed(function: Callable[[], object]) -> dict[str, float]:
    """Returns the seconds of a call, on the clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def in_turn(ways: dict[str, Callable[[], object]], runs: int, before: Callable = int) -> dict:
    """Returns the medians of `timed` for each way; `before` is called before each run."""
    found = {name: [] for name in ways}
    for _ in range(runs):
        for name, function in ways.items():
            before()
            found[name].append(timed(function))
    return {
        name: {key: round(statistics.median(run[key] for run in runs), 5) for key in runs[0]}
        for name, runs in found.items()
    }


def drop_cache() -> None:
    """Makes the kernel forget the content of files; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def prepare(folder: Path, runs: int) -> dict:
    """Reads the files by h5py alone, and prepares a store of them."""
    data = get_config().data
    data.update(source="pcam_hdf5", dir=str(folder), store=str(folder / "store"))

    def read_plainly() -> None:
        band = np.empty((512, 96, 96, 3), np.uint8)
        for split, count in COUNTS.items():
            with h5py.File(images_file(folder, split)) as file:
                for start in range(0, count, len(band)):
                    file["x"].read_direct(band, np.s_[start : start + len(band)])

    def remove() -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)

    ways = {"h5py": read_plainly, "prepare": lambda: store.prepare(data)}
    return in_turn(ways, runs, remove)


def batch_rows(seed: int, size: int) -> list[np.ndarray]:
    """Returns the rows of random batches."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, COUNTS["train"], size) for _ in range(BATCHES)]


def cold(folder: Path, runs: int) -> dict:
    """Reads random batches of 64 from the disk: ours, one pread after the other, and a map."""
    split, file = store.open_split(folder / "store", "train"), images_of(folder)
    descriptor, seeds = os.open(file, os.O_RDONLY), itertools.count()
    start = file.stat().st_size - split.images.nbytes

    def pread() -> None:
        for row in np.concatenate(batch_rows(next(seeds), 64)).tolist():
            os.pread(descriptor, ROW_BYTES, start + row * ROW_BYTES)

    # Each run has rows of its own, and a map of its own: the cache keeps pages that are mapped.
    def gather(images: np.ndarray) -> None:
        for rows in batch_rows(next(seeds), 64):
            images[rows]

    ways = {
        "ours": lambda: gather(split.images),
        "pread": pread,
        "map": lambda: gather(np.load(file, mmap_mode="r")),
    }
    return in_turn(ways, runs, drop_cache)


def images_of(folder: Path) -> Path:
    """Returns the file of the images of the training split."""
    return folder / "store" / "train" / "images.npy"


def warm(folder: Path, runs: int) -> dict:
    """Makes batches of files in memory: ours, a map's first visit of a row, and the second."""
    split, mesh = store.open_split(folder / "store", "train"), sharding.make_mesh()
    for _ in near_duplicates.blocks(split.images):
        pass  # brings the file into memory
    found = {}
    for size in (32, 64, 256):
        batches, maps = batch_rows(0, size), []

        def put(images: np.ndarray, batches: list[np.ndarray] = batches) -> None:
            of = Split("train", images, split.labels, split.ids)
            jax.block_until_ready([put_batch(of, mesh, rows) for rows in batches])

        def first(maps: list = maps, put: Callable = put) -> None:
            maps[:] = [np.load(images_of(folder), mmap_mode="r")]
            put(maps[0])

        ways = {
            "ours": lambda put=put: put(split.images),
            "map, first": first,
            "map, again": lambda maps=maps, put=put: put(maps[0]),
        }
        found[size] = in_turn(ways, runs)
    return found


def near(folder: Path, runs: int) -> dict:
    """Computes the grids of the training split from the disk: ours, and with a map."""
    ours = store.open_split(folder / "store", "train").images
    ways = {
        "ours": lambda: near_duplicates.luma_grids(ours),
        "map": lambda: near_duplicates.luma_grids(np.load(images_of(folder), mmap_mode="r")),
    }
    return in_turn(ways, runs, drop_cache)


MODES = {"prepare": (prepare, 1), "cold": (cold, 5), "warm": (warm, 7), "near": (near, 3)}


def main() -> None:
    """Makes the files, or measures one thing and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("make", *MODES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patches", type=Path, help="make: the folder with pcam_subset.py")
    parser.add_argument("--runs", type=int, help="of each way that is compared")
    arguments = parser.parse_args()
    if arguments.mode == "make":
        make(arguments.folder, arguments.patches)
        return
    measure, runs = MODES[arguments.mode]
    found = measure(arguments.folder, arguments.runs or runs)
    print(json.dumps({"mode": arguments.mode, "seconds": found}))


if __name__ == "__main__":
    main()
