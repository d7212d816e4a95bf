"""results/composed_slide.py: the patches, the truth and the places of a slide agree."""

import csv
import importlib.util
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import tifffile

ROOT = Path(__file__).parents[1]
PLANS = {
    "tumor_1": ((7, 9), [(3, 4, 3, 4)], [(2, 3, 1, 2), (5, 5, 0, 0)]),
    "normal_1": ((2, 3), [(0, 1, 1, 1)], []),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("composed", ROOT / "results/composed_slide.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PLANS, module.CLASSES = PLANS, {"tumor_1": "micro"}
    return module


@pytest.fixture(scope="module")
def patches():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 96, 96, 3), dtype=np.uint8)
    ids = np.array([f"valid/{number}" for number in range(100)])
    return {"images": images, "labels": np.arange(100) % 2, "ids": ids}


@pytest.fixture(scope="module")
def out(script, patches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed")
    np.savez(folder / "valid.npz", **patches)
    script.compose(folder, folder / "valid.npz")
    return folder


@pytest.fixture(scope="module")
def cells(out):
    with open(out / "cells.csv") as file:
        return [row for row in csv.DictReader(file) if row["slide"] == "tumor_1"]


def corner(cell):
    """Returns the upper left corner of a cell's patch, y and x at the scale of the patches."""
    return 64 + 96 * int(cell["row"]), 64 + 96 * int(cell["column"])


def test_openslide_reads_the_patches_as_they_are(out, cells, patches):
    openslide = pytest.importorskip("openslide")
    known = dict(zip(patches["ids"], patches["images"], strict=True))
    with openslide.OpenSlide(out / "slides/tumor_1.tif") as slide:
        assert slide.level_downsamples[:4] == (1, 2, 4, 8)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.243)
        for cell in cells:
            y, x = corner(cell)
            read = np.asarray(slide.read_region((4 * x, 4 * y), 2, (96, 96)))
            np.testing.assert_array_equal(read[..., :3], known[cell["id"]])
    assert len(cells) > 30 and len({cell["id"] for cell in cells}) == len(cells)


def test_all_forms_of_the_truth_are_those_of_the_labels(out, cells):
    labelled = np.zeros(tifffile.imread(out / "truth_mask/tumor_1_mask.tif").shape, bool)
    for cell in cells:
        y, x = corner(cell)
        labelled[y : y + 96, x : x + 96] = cell["label"] == "1"
    np.testing.assert_array_equal(
        tifffile.imread(out / "truth_mask/tumor_1_mask.tif"), labelled * 255
    )
    geojson = json.loads((out / "truth_geojson/tumor_1.geojson").read_text())
    rings = [each["geometry"]["coordinates"][0][:-1] for each in geojson["features"]]
    asap = [
        [(int(point.get("X")), int(point.get("Y"))) for point in annotation.iter("Coordinate")]
        for annotation in ET.parse(out / "truth_xml/tumor_1.xml").iter("Annotation")
    ]
    assert [[tuple(point) for point in ring] for ring in rings] == asap
    np.testing.assert_array_equal(covered(asap, labelled.shape), labelled)


def covered(rings, shape):
    """Returns which pixels of level 2 have their centre in a polygon, by shapely."""
    shapely = pytest.importorskip("shapely")
    y, x = (4 * (np.mgrid[: shape[0], : shape[1]] + 0.5)).reshape(2, -1)
    polygons = shapely.union_all([shapely.Polygon(ring) for ring in rings])
    return shapely.contains_xy(polygons, x, y).reshape(shape)


def test_windows_are_matched_with_their_cells(script, cells):
    for cell in cells:
        y, x = corner(cell)
        window = {"x": str(4 * (x + 32)), "y": str(4 * (y + 32))}
        assert script.cell_of(window) == (int(cell["row"]), int(cell["column"]))


def test_the_reference_lists_all_slides(out):
    lines = (out / "truth_xml/reference.csv").read_text().splitlines()
    assert lines == ["image,type,class", "tumor_1,Tumor,micro", "normal_1,Normal,none"]
