"""The memory of scoring a slide does not grow with the slide."""

import subprocess
import sys

import pytest

from tests.slides.slide_files import write_sparse

# Scores a slide with a cheap function; prints the windows and the most memory, in KiB.
SCORE = """
import resource, sys
from pathlib import Path
import numpy as np
from bef_jax.data.patch import Tiling
from bef_jax.scoring.scorer import in_batches
from bef_jax.scoring.slide_scorer import score_rows
from bef_jax.slides.reader import open_slide
from bef_jax.slides.tiles import block_rows, make_grid

def predict(tiles):
    for batch in in_batches(tiles, 256):
        yield np.stack(batch).mean((1, 2, 3)) / 255

with open_slide(Path(sys.argv[1])) as slide:
    grid = make_grid(slide, Tiling(96, 32, 32), 0.972)
    count = 0
    for windows in score_rows(predict, slide, grid, block_rows(grid)):
        count += len(windows.rows)
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_slide(tmp_path):
    pytest.importorskip("openslide")
    counts, peaks = [], []
    for side in (20_000, 80_000):
        # The same share of both is tissue, and is as wide as the slide.
        box = (0, 0.4, 1, 0.5)
        file = write_sparse(tmp_path / f"{side}.tif", side, tissue=box)
        ran = subprocess.run([sys.executable, "-c", SCORE, file], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        count, peak = map(int, ran.stdout.split())
        counts.append(count)
        peaks.append(peak)
    assert counts[1] > 10 * counts[0] > 0
    assert abs(peaks[1] - peaks[0]) <= 50 << 10
