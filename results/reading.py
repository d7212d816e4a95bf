"""Measures the images/s of reading a folder of pictures: ours, and torchvision's ImageFolder.

    python -m venv peer && peer/bin/pip install torch==2.14.1 torchvision==0.29.1
    python results/reading.py DIR --side=96 --peer=peer/bin/python

DIR has a folder for each class. Both read all pictures as uint8, with a worker for each core that
this process may use: threads here, processes of a DataLoader there. They run in turn, each in a new
process, which reads all pictures twice and times the second time. A line of JSON each has the
median of the runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

WORKERS = len(os.sched_getaffinity(0))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="with a folder for each class")
    parser.add_argument("--side", type=int, default=96, help="of the pictures, in pixels")
    parser.add_argument("--peer", help="a Python that has torchvision; without it, ours alone runs")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--reader", choices=tuple(READERS), help="times one, in this process")
    return parser.parse_args(argv)


def make_ours(folder: str, side: int) -> Callable[[], int]:
    """Returns a function that reads all pictures, and returns how many there are."""
    from bef_jax.configs.default import get_config
    from bef_jax.data import sources

    data = get_config().data
    data.update(source="image_folder", dir=folder, patch_size=side)
    return lambda: sum(len(chunk.labels) for _, chunk in sources.open_source(data).chunks)


def make_torchvision(folder: str, side: int) -> Callable[[], int]:
    """Returns a function that reads all pictures, and returns how many there are."""
    del side
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    loader = DataLoader(
        ImageFolder(folder, PILToTensor()),
        batch_size=64,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    return lambda: sum(len(labels) for _, labels in loader)


READERS = {"bef_jax": make_ours, "torchvision": make_torchvision}


def images_per_second(read: Callable[[], int]) -> float:
    """Returns the images/s of the second call, when files are in memory and workers have begun."""
    read()
    start = time.perf_counter()
    return read() / (time.perf_counter() - start)


def run(python: str, reader: str, arguments: argparse.Namespace) -> float:
    """Returns the images/s that a new process measured."""
    words = [python, __file__, arguments.folder, f"--side={arguments.side}", f"--reader={reader}"]
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Prints a line of JSON for each reader; with --reader, the images/s of a run of that one."""
    arguments = parse_arguments()
    if arguments.reader:
        read = READERS[arguments.reader](arguments.folder, arguments.side)
        print(images_per_second(read))
        return
    pythons = {"bef_jax": sys.executable}
    if arguments.peer:
        pythons["torchvision"] = arguments.peer
    rates: dict[str, list[float]] = {reader: [] for reader in pythons}
    for _ in range(arguments.runs):
        for reader, python in pythons.items():
            rates[reader].append(run(python, reader, arguments))
    for reader, found in rates.items():
        facts = {"reader": reader, "side": arguments.side, "workers": WORKERS}
        median = statistics.median(found)
        print(json.dumps({**facts, "images_per_second": median, "runs": found}))


if __name__ == "__main__":
    main()
