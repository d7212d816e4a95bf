r"""Measures tiles/s of reading a slide: ours, and that of WSInfer and TIAToolbox.

    pip install wsinfer "zarr<3" openslide-python openslide-bin  # in an environment of its own
    pip install tiatoolbox openslide-bin                         # in another one
    python results/slide_reading.py SLIDE --texture=cmu_small_region.svs \
        --peer=wsinfer=PYTHON --peer=tiatoolbox=PYTHON
    python results/slide_reading.py SLIDE --texture=cmu_small_region.svs --network --stride=32

SLIDE, 20,480 px at 0.25 um/px, is made from the pixels of `--texture` if it is not there: a JPEG
pyramid with tiles of 256 px. Each program gives tiles of 96 px at the scale of PCam (0.972 um/px;
the level of 1.0 um/px is near enough to be read as it is), which lie side by side, 100 for
960 x 960 pixels, on one core. Ours also finds tissue. The programs take turns, and a line of JSON
each has the median of the runs. With --network, a model of random weights scores the slide on all
cores as `predict` does. The line says for which share of the time it waited for pixels, and how
many windows/s its engine scores without reading.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

# What only one of the programs needs is imported where it is used, because each of them runs in an
# environment of its own.

MPP, SLIDE_MPP = 0.972, 0.25
SIDE, JPEG_TILE = 96, 256
FACTORS = (1, 2, 4, 16)  # of the slide's levels


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide", type=Path, help="is made if it is not there")
    parser.add_argument("--texture", type=Path, help="a slide of 0.5 um/px whose pixels are used")
    parser.add_argument("--length", type=int, default=20_480, help="of the slide that is made")
    parser.add_argument("--tiles", type=int, default=600, help="of the ways that read tile by tile")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], help="PROGRAM=PYTHON that has it")
    parser.add_argument("--way", choices=tuple(WAYS), help="times one program, in this process")
    parser.add_argument("--model", default="efficientnet_b0", help="with --network")
    parser.add_argument("--network", action="store_true", help="measures waiting instead")
    parser.add_argument("--stride", type=int, default=32, help="between windows, with --network")
    parser.add_argument("--rows", type=int, help="of blocks that are scored, with --network")
    return parser.parse_args(argv)


# ---- the slide ----------------------------------------------------------------------------------


def make_slide(path: Path, texture: Path, length: int) -> None:
    """Writes a pyramid whose levels repeat the largest level of `texture`, at their scale."""
    import tifffile

    with openslide.OpenSlide(texture) as slide:
        image = slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for factor in FACTORS:
            side = length // factor
            tif.write(
                encoded_tiles(image, factor, side),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(JPEG_TILE, JPEG_TILE),
                photometric="rgb",
                compression="jpeg",
                subfiletype=min(factor - 1, 1),
                resolution=(10_000 / SLIDE_MPP / factor,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def encoded_tiles(image: Image.Image, factor: int, side: int) -> Iterator[bytes]:
    """Yields the tiles of one level, row by row."""
    size = [max(JPEG_TILE, each * 2 // factor // JPEG_TILE * JPEG_TILE) for each in image.size]
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    tiles = [
        [
            encoded(pixels[y : y + JPEG_TILE, x : x + JPEG_TILE])
            for x in range(0, size[0], JPEG_TILE)
        ]
        for y in range(0, size[1], JPEG_TILE)
    ]
    count = math.ceil(side / JPEG_TILE)
    for row, column in itertools.product(range(count), repeat=2):
        of_row = tiles[row % len(tiles)]
        yield of_row[column % len(of_row)]


def encoded(pixels: np.ndarray) -> bytes:
    """Returns a JPEG with the colours and the subsampling that tifffile writes into its tags."""
    import imagecodecs

    return imagecodecs.jpeg8_encode(
        pixels, level=85, colorspace="rgb", outcolorspace="ycbcr", subsampling=(2, 2)
    )


# ---- ways to read -------------------------------------------------------------------------------


def read_by_blocks(path: Path, count: int) -> int:
    """Reads all of a slide as `bef_jax` does, and returns how many tiles there are."""
    from bef_jax.data.patch import Tiling
    from bef_jax.slides.blocks import read_blocks
    from bef_jax.slides.reader import open_slide
    from bef_jax.slides.tiles import block_rows, make_grid

    del count
    with open_slide(path) as slide:
        grid = make_grid(slide, Tiling(SIDE, 32, SIDE), MPP)
        blocks = [block for row in block_rows(grid) for block in row]
        tiles = 0
        for read in read_blocks(slide, grid, blocks):
            # All are cut, with or without tissue, because the other ways read all, too.
            places = itertools.product(read.block.rows, read.block.columns)
            tiles += len(np.stack([read.tile(row, column, grid) for row, column in places]))
        return tiles


def read_with_wsinfer(path: Path, count: int) -> int:
    """Reads `count` tiles from the middle of a slide with WSInfer: a region of level 0 for each."""
    import h5py
    from torchvision.transforms import Compose, Resize, ToTensor
    from wsinfer.modellib.data import WholeSlideImagePatches

    places, side = middle(path, count)
    with tempfile.NamedTemporaryFile(suffix=".h5") as file:
        with h5py.File(file.name, "w") as h5:
            coords = h5.create_dataset("coords", data=np.array(places))
            coords.attrs.update(patch_level=0, patch_size=side)
        patches = WholeSlideImagePatches(path, file.name, Compose([Resize(SIDE), ToTensor()]))
    patches.worker_init()
    return sum(len(patches[number]) == 2 for number in range(len(patches)))


def read_with_tiatoolbox(path: Path, count: int) -> int:
    """Reads the same tiles with TIAToolbox, which chooses the level by itself."""
    from tiatoolbox.wsicore.wsireader import WSIReader

    reader = WSIReader.open(path)
    for place in middle(path, count)[0]:
        reader.read_rect(place, (SIDE, SIDE), resolution=MPP, units="mpp")
    return count


def middle(path: Path, count: int) -> tuple[list[tuple[int, int]], int]:
    """Returns corners of `count` tiles in the middle of a slide, and their side, at level 0."""
    with openslide.OpenSlide(path) as slide:
        width, _ = slide.dimensions
    step = SIDE * MPP / SLIDE_MPP
    columns = int(width / step)
    first = max(0, columns - math.ceil(count / columns)) // 2
    rows = (divmod(number, columns) for number in range(count))
    return [(round(x * step), round((first + y) * step)) for y, x in rows], round(step)


WAYS = {
    "bef_jax": read_by_blocks,
    "wsinfer": read_with_wsinfer,
    "tiatoolbox": read_with_tiatoolbox,
}


def time_one_way(way: str, path: Path, count: int) -> None:
    """Prints the tiles/s of one way on one core; the first of two readings is not counted."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    WAYS[way](path, 10)
    start = time.process_time()  # of all threads, so that other programs do not count
    tiles = WAYS[way](path, count)
    print(tiles / (time.process_time() - start))


def compare(arguments: argparse.Namespace) -> None:
    """Prints the median tiles/s of each way; they run in turn, each in a new process."""
    pythons = {"bef_jax": sys.executable} | dict(each.split("=", 1) for each in arguments.peer)
    rates: dict[str, list[float]] = {way: [] for way in pythons}
    for _ in range(arguments.runs):
        for way, python in pythons.items():
            options = [f"--way={way}", f"--tiles={arguments.tiles}"]
            command = [python, __file__, str(arguments.slide), *options]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            rates[way].append(float(answer.stdout.split()[-1]))
    for way, found in rates.items():
        median = statistics.median(found)
        print(json.dumps({"way": way, "tiles_per_second": median, "runs": found}))


# ---- with a network -----------------------------------------------------------------------------


def measure_waiting(arguments: argparse.Namespace) -> None:
    """Prints for which share of the time a network waits for pixels."""
    from bef_jax.configs.default import get_config
    from bef_jax.data.patch import Tiling
    from bef_jax.runtime import sharding
    from bef_jax.scoring.engines.predictor import EngineScorer
    from bef_jax.scoring.scorer import make_predictor
    from bef_jax.scoring.slide_scorer import for_slides, score_row
    from bef_jax.slides.reader import open_slide
    from bef_jax.slides.tiles import block_rows, make_grid
    from bef_jax.training.state import create_state

    config, mesh = get_config(f"model.name={arguments.model}"), sharding.make_mesh()
    variables = create_state(config, sharding.replicated(mesh)).eval_variables()
    scorer = EngineScorer(config, variables, mesh)
    scorer.expect(10**6)  # an area of so many tiles is worth a choice
    predict = for_slides(make_predictor(config, scorer, mesh), config, mesh)
    patches = np.zeros((8 * config.eval.batch_size, SIDE, SIDE, 3), np.uint8)
    for count in (1, config.eval.batch_size):  # both programs are compiled before
        list(predict(patches[:count]))
    start = time.perf_counter()
    list(predict(patches))
    bare = len(patches) / (time.perf_counter() - start)
    with open_slide(arguments.slide) as slide:
        grid = make_grid(slide, Tiling(SIDE, 32, arguments.stride), MPP)
        rows, waits = list(block_rows(grid))[: arguments.rows], []
        start = time.perf_counter()
        found = (score_row(predict, slide, grid, row, wait=waits.append) for row in rows)
        windows = sum(len(each.rows) for each in found)
        seconds = time.perf_counter() - start
    facts = {"model": arguments.model, "engine": scorer.engine, "stride": arguments.stride}
    facts |= {"windows": windows, "seconds": seconds, "input_wait_fraction": sum(waits) / seconds}
    rates = {"windows_per_second": windows / seconds, "bare_windows_per_second": bare}
    print(json.dumps(facts | rates))


def main() -> None:
    """Makes the slide if it is missing, and measures."""
    arguments = parse_arguments()
    if arguments.way:
        time_one_way(arguments.way, arguments.slide, arguments.tiles)
        return
    if not arguments.slide.exists():
        make_slide(arguments.slide, arguments.texture, arguments.length)
    measure_waiting(arguments) if arguments.network else compare(arguments)


if __name__ == "__main__":
    main()
