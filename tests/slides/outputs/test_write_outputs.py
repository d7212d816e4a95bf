"""All outputs of one slide: which files there are, what is returned, and that bytes are equal."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from bef_jax.configs import default
from bef_jax.data.patch import Tiling
from bef_jax.scoring.slide_scorer import Windows, score_row
from bef_jax.slides.outputs import write_outputs
from bef_jax.slides.reader import open_slide
from bef_jax.slides.tiles import block_rows, make_grid
from tests.memory import begin_peak, peak
from tests.slides.outputs.fake_slide import grid_of, windows_of

FILES = {"tiles.csv.gz", "probability.tif", "heatmap.png", "mask.png", "regions.geojson.gz"}


def config_of(classes=2, **slides):
    config = default.get_config()
    config.model.num_classes = classes
    config.slides.update(slides)
    return config


def write(folder, probability, config=None):
    grid, slide = grid_of(*probability.shape[:2])
    return write_outputs(folder, slide, grid, windows_of(probability), config or config_of())


def noise(shape, seed=0):
    rng = np.random.default_rng(seed)
    probability = rng.random(shape)
    probability[rng.random(shape[:2]) < 0.3] = np.nan
    probability[5, 5] = -1
    return probability


def test_facts_are_those_of_the_probabilities(tmp_path):
    probability = noise((50, 40))
    facts = write(tmp_path, probability, config_of(top=3))
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"detections.csv"}
    known = probability[probability >= 0]
    expected = {
        "width": (39 * 32 + 16) * 4,
        "height": (49 * 32 + 16) * 4,
        "mpp": 0.25,
        "level": 0,
        "grid": {"rows": 50, "columns": 40, "side": 128.0, "stride": 128.0},
        "tissue_share": len(known) / 2000,
        "windows": len(known) + 1,
        "failed": 1,
        "positives": (known >= 0.5).sum(),
        "score": np.sort(known)[-3:].mean(),
    }
    assert {name: facts[name] for name in expected} == expected
    with gzip.open(tmp_path / "tiles.csv.gz", "rt") as file:
        assert len(list(csv.reader(file))) == facts["windows"] + 1
    regions = json.loads(gzip.decompress((tmp_path / "regions.geojson.gz").read_bytes()))
    longest = [
        feature["properties"]["measurements"]["diameter um"] for feature in regions["features"]
    ]
    assert facts["regions"] == len(longest)
    assert facts["largest_lesion_um"] == pytest.approx(max(longest), abs=0.06)
    assert facts["lesion_class"] == "micro"
    assert len((tmp_path / "detections.csv").read_text().splitlines()) == facts["detections"] + 1
    json.dumps(facts)


def test_equal_windows_give_equal_bytes(tmp_path):
    contents = []
    for name in ("a", "b"):
        facts = write(tmp_path / name, noise((40, 33)))
        files = sorted((tmp_path / name).iterdir())
        contents.append((facts, [(file.name, file.read_bytes()) for file in files]))
    assert contents[0] == contents[1]


def test_a_slide_without_tissue_has_all_files(tmp_path):
    facts = write(tmp_path, np.full((4, 6), np.nan))
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"detections.csv"}
    assert facts["score"] is None and facts["lesion_class"] == "none"
    assert facts["windows"] == facts["regions"] == facts["detections"] == 0
    assert facts["tissue_share"] == facts["largest_lesion_um"] == 0


def test_a_slide_of_which_nothing_can_be_read_has_no_class(tmp_path):
    probability = np.full((4, 6), np.nan)
    probability[1:3] = -1
    facts = write(tmp_path, probability)
    assert (facts["windows"], facts["failed"]) == (12, 12)
    assert facts["score"] is facts["lesion_class"] is facts["largest_lesion_um"] is None


def test_more_classes_have_counts_and_no_detections(tmp_path):
    (tmp_path / "detections.csv").write_text("of an earlier run")
    probability = np.random.default_rng(0).dirichlet(np.ones(3), (20, 30))
    probability[:2] = np.nan
    facts = write(tmp_path, probability, config_of(3))
    assert {file.name for file in tmp_path.iterdir()} == FILES
    called = probability[2:].argmax(axis=-1)
    assert facts["counts"] == {str(i): (called == i).sum() for i in range(3)}
    unknown = ("positives", "score", "largest_lesion_um", "lesion_class", "detections")
    assert not any(facts[name] is not None for name in unknown)
    json.dumps(facts)


def test_a_real_slide_has_a_map_of_its_tissue(tmp_path):
    """Scores windows by how dark they are, and reads the outputs of the same tissue back."""
    pytest.importorskip("openslide")
    if not (slides := os.environ.get("BEF_SLIDES_DIR")):
        pytest.skip("BEF_SLIDES_DIR does not name the folder of real slides")

    def predict(tiles):
        yield np.array([1 - tile[32:64, 32:64].mean() / 255 for tile in tiles])

    with open_slide(Path(slides) / "cmu_small_region.svs") as slide:
        grid = make_grid(slide, Tiling(96, 32, 32), 0.972)
        rows = [score_row(predict, slide, grid, blocks) for blocks in block_rows(grid)]
        facts = write_outputs(tmp_path, slide, grid, lambda: iter(rows), config_of())
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    assert mask.shape == (48, 36) and (mask == 255).sum() == facts["windows"]
    probability = tifffile.imread(tmp_path / "probability.tif")
    np.testing.assert_array_equal(np.isnan(probability), mask == 0)
    regions = json.loads(gzip.decompress((tmp_path / "regions.geojson.gz").read_bytes()))
    areas = [each["properties"]["measurements"]["area um^2"] for each in regions["features"]]
    expected = facts["positives"] * (32 * 0.972) ** 2
    assert sum(areas) == pytest.approx(expected, rel=0.01)  # some end at the slide's edge


def _measure(folder):
    """Writes a slide of 2,500 x 2,500 windows, and prints how many bytes the process grew."""
    side = 2500
    grid, slide = grid_of(side, side)
    slide.levels = (*slide.levels, slide.levels[0]._replace(width=5000, height=5000))

    def windows():
        for top in range(0, side, 30):
            rows, columns = np.mgrid[top : min(top + 30, side), :side].reshape(2, -1)
            waves = np.sin(rows / 125) * np.cos(columns / 100)
            yield Windows(rows.astype(np.int32), columns.astype(np.int32), 0.5 + 0.5 * waves)

    before = begin_peak()
    write_outputs(Path(folder), slide, grid, windows, config_of())
    print(peak() - before)


@pytest.mark.slow
def test_memory_stays_small_for_a_large_slide(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux reports the peak memory of a process")
    root = Path(__file__).parents[3]
    module = "tests.slides.outputs.test_write_outputs"
    code = f"from {module} import _measure; _measure({str(tmp_path)!r})"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(found.stdout) < 250e6
