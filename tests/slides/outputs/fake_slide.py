"""A slide in memory, its grid, and windows with given probabilities."""

from pathlib import Path

import numpy as np

from bef_jax.data.patch import Tiling
from bef_jax.scoring.slide_scorer import Windows
from bef_jax.slides.outputs.window_map import gather
from bef_jax.slides.reader import Level, Region, Slide
from bef_jax.slides.tiles import Grid


class FakeSlide(Slide):
    """A slide whose pixels are computed where they are read; `reads` has what was asked for."""

    def __init__(self, width, height, downsamples=(1,), mpp=0.25, pixels=None):
        self.path, self.mpp, self.reader = Path("fake.svs"), mpp, "fake"
        sides = [(-(-width // d), -(-height // d)) for d in downsamples]
        self.levels = tuple(Level(w, h, (width / w, height / h)) for w, h in sides)
        self.pixels, self.reads = pixels, []

    def read(self, level, x, y, width, height):
        of_level = self.levels[level]
        assert x >= 0 and y >= 0 and x + width <= of_level.width and y + height <= of_level.height
        assert width > 0 and height > 0
        self.reads.append((level, width * height))
        if self.pixels is not None:
            return Region(self.pixels[y : y + height, x : x + width])
        return Region(np.full((height, width, 3), 200, np.uint8))

    def close(self):
        pass


def grid_of(rows, columns, stride=32, center=32, scale=(4.0, 4.0), block=30):
    """Returns a grid and a slide that it covers; the last windows reach past the edge."""
    sides = ((n - 1) * stride + (center + 1) // 2 for n in (columns, rows))
    width, height = sides
    tiling = Tiling(96, center, stride)
    grid = Grid(tiling, 0, scale, scale, width, height, rows, columns, 0.25 * scale[0])
    return grid, FakeSlide(round(width * scale[0]), round(height * scale[1]))


def windows_of(probability, block=30):
    """Returns a function that yields windows row of blocks by row of blocks.

    Args:
        probability: [rows, columns] or [rows, columns, K]; NaN for glass, -1 for failed windows.
    """
    glass = np.isnan(probability if probability.ndim == 2 else probability[..., 0])

    def windows():
        for top in range(0, len(probability), block):
            rows, columns = np.nonzero(~glass[top : top + block])
            found = probability[rows + top, columns].astype(float)
            found[found < 0] = np.nan
            yield Windows((rows + top).astype(np.int32), columns.astype(np.int32), found)

    return windows


def map_of(probability, threshold=0.5, **options):
    """Returns the map of a grid with these probabilities, and its slide."""
    grid, slide = grid_of(*probability.shape[:2], **options)
    return gather(slide, grid, windows_of(probability)(), threshold), slide
