"""Measures tiles/s of reading a slide: ours, and one region a tile as other programs read.

    python results/slide_reading.py SLIDE --texture=cmu_small_region.svs
    python results/slide_reading.py SLIDE --texture=cmu_small_region.svs --network --stride=96

SLIDE, 20,480 px at 0.25 um/px, is made from the pixels of `--texture` if it is not there: a JPEG
pyramid with tiles of 256 px. Each way gives tiles of 96 px at the scale of PCam (0.972 um/px; the
level of 1.0 um/px is near enough to be read as it is), which lie side by side, 100 for 960 x 960
pixels, on one core. Ours also finds tissue. The ways take turns, and a line of JSON each has the
median of the runs. With --network, a B0 of random weights scores the slide on all cores, and the
line says for which share of the time it waited for pixels.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import tifffile
from PIL import Image

from bef_jax.data.patch import Tiling
from bef_jax.slides.blocks import read_blocks
from bef_jax.slides.reader import open_slide
from bef_jax.slides.tiles import block_rows, make_grid

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
    parser.add_argument("--network", action="store_true", help="measures waiting instead")
    parser.add_argument("--stride", type=int, default=32, help="between windows, with --network")
    parser.add_argument("--rows", type=int, help="of blocks that are scored, with --network")
    return parser.parse_args(argv)


# ---- the slide ----------------------------------------------------------------------------------


def make_slide(path: Path, texture: Path, length: int) -> None:
    """Writes a pyramid whose levels repeat the largest level of `texture`, at their scale."""
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
    return imagecodecs.jpeg8_encode(
        pixels, level=85, colorspace="rgb", outcolorspace="ycbcr", subsampling=(2, 2)
    )


# ---- ways to read -------------------------------------------------------------------------------


def read_by_blocks(path: Path, count: int) -> int:
    """Reads all of a slide as `bef_jax` does, and returns how many tiles there are."""
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


def read_at_level_0(path: Path, count: int) -> int:
    """Reads tiles as WSInfer 0.6 does: a region of level 0 for each, made smaller with Pillow."""
    return read_tile_by_tile(path, count, 0)


def read_at_finer_level(path: Path, count: int) -> int:
    """Reads tiles as TIAToolbox does: from the coarsest level that is not coarser than wanted."""
    return read_tile_by_tile(path, count, 1)


def read_tile_by_tile(path: Path, count: int, level: int) -> int:
    """Reads tiles, as many as wanted from the middle of the slide, one region for each."""
    with openslide.OpenSlide(path) as slide:
        step = SIDE * MPP / SLIDE_MPP  # pixels of level 0
        side = round(step / slide.level_downsamples[level])
        columns = int(slide.dimensions[0] / step)
        first = max(0, columns - math.ceil(count / columns)) // 2
        for number in range(count):
            row, column = divmod(number, columns)
            place = round(column * step), round((first + row) * step)
            region = slide.read_region(place, level, (side, side)).convert("RGB")
            np.asarray(region.resize((SIDE, SIDE)))
        return count


WAYS = {"bef_jax": read_by_blocks, "wsinfer": read_at_level_0, "tiatoolbox": read_at_finer_level}


def tiles_per_second(read: Callable[[Path, int], int], path: Path, count: int) -> float:
    """Returns the tiles of one call for each second that the core was ours."""
    start = time.process_time()  # of all threads, so that other programs do not count
    return read(path, count) / (time.process_time() - start)


def compare(arguments: argparse.Namespace) -> None:
    """Prints the median tiles/s of each way on one core."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.runs):
        for way, read in WAYS.items():
            rates[way].append(tiles_per_second(read, arguments.slide, arguments.tiles))
    for way, found in rates.items():
        median = statistics.median(found)
        print(json.dumps({"way": way, "tiles_per_second": median, "runs": found}))


# ---- with a network -----------------------------------------------------------------------------


def measure_waiting(arguments: argparse.Namespace) -> None:
    """Prints for which share of the time a network waits for pixels."""
    from bef_jax.configs.default import get_config
    from bef_jax.runtime import sharding
    from bef_jax.scoring.scorer import make_predictor
    from bef_jax.scoring.slide_scorer import for_slides, score_rows
    from bef_jax.training.state import create_state

    config, mesh = get_config(), sharding.make_mesh()
    variables = create_state(config, sharding.replicated(mesh)).eval_variables()
    predict = for_slides(make_predictor(config, variables, mesh), config, mesh)
    for count in (1, config.eval.batch_size):  # both programs are compiled before
        list(predict(np.zeros((count, SIDE, SIDE, 3), np.uint8)))
    with open_slide(arguments.slide) as slide:
        grid = make_grid(slide, Tiling(SIDE, 32, arguments.stride), MPP)
        rows, waits = list(block_rows(grid))[: arguments.rows], []
        start = time.perf_counter()
        found = score_rows(predict, slide, grid, rows, wait=waits.append)
        windows = sum(len(each.rows) for each in found)
        seconds = time.perf_counter() - start
    facts = {"stride": arguments.stride, "windows": windows, "seconds": seconds}
    print(json.dumps(facts | {"input_wait_fraction": sum(waits) / seconds}))


def main() -> None:
    """Makes the slide if it is missing, and measures."""
    arguments = parse_arguments()
    if not arguments.slide.exists():
        make_slide(arguments.slide, arguments.texture, arguments.length)
    measure_waiting(arguments) if arguments.network else compare(arguments)


if __name__ == "__main__":
    main()
