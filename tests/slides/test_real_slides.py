"""Checks real slides of several scanners; their folder is in BEF_SLIDES_DIR."""

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile

from bef_jax.errors import UserError
from bef_jax.slides.reader import find_slides, open_slide
from bef_jax.slides.readers.with_tifffile import TiffReader

openslide = pytest.importorskip("openslide")
if "BEF_SLIDES_DIR" not in os.environ:
    pytest.skip("BEF_SLIDES_DIR names no folder of real slides", allow_module_level=True)
FOLDER = Path(os.environ["BEF_SLIDES_DIR"])

FACTS = {
    "cmu_small_region.svs": ("openslide aperio", 0.499, [(2220, 2967)]),
    "tcga_ts1_j2k.svs": ("openslide aperio", None, [(4443, 3567), (2221, 1783)]),
    "kidney_plain.tif": ("tifffile tiff", None, [(1493, 901)]),
    "boxes.tiff": (
        "openslide generic-tiff",
        352.778,
        [(300, 250), (150, 125), (75, 62), (37, 31)],
    ),
    "boxes_0.dcm": ("openslide dicom", 0.499, [(16, 16)]),
    "boxes_1.dcm": ("openslide dicom", 0.499, [(16, 16)]),
    "sm_image.dcm": ("openslide dicom", 0.499, [(50, 50)]),
    "small.svs": ("openslide aperio", 0.499, [(16, 16)]),
    "unreadable.svs": ("openslide aperio", 0.499, [(16, 16)]),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_slides_say_of_themselves(name):
    with open_slide(FOLDER / name) as slide:
        sizes = [level[:2] for level in slide.levels]
        assert (slide.reader, slide.mpp and round(slide.mpp, 3), sizes) == FACTS[name]
        width, height = sizes[0]
        region = slide.read(0, 0, 0, min(width, 400), min(height, 400))
        if name == "unreadable.svs":
            assert region.failed.all()
        else:
            assert region.failed is None


@pytest.mark.parametrize("name", ["cmu_small_region.svs", "tcga_ts1_j2k.svs", "boxes.tiff"])
def test_both_libraries_read_the_same_pixels(name):
    with open_slide(FOLDER / name) as one, TiffReader(FOLDER / name, None) as other:
        assert one.levels == other.levels
        for level in range(len(one.levels)):
            width, height = (min(side, 900) // 2 for side in one.levels[level][:2])
            # At a factor such as 2.0005 OpenSlide's pixels are a mix with those beside them.
            found = [each.read(level, width, height, width, height).pixels for each in (one, other)]
            assert abs(found[0].astype(int) - found[1]).mean() < (3 if level else 1)


def test_a_plain_tiff_has_tifffiles_pixels():
    expected = tifffile.imread(FOLDER / "kidney_plain.tif")
    with open_slide(FOLDER / "kidney_plain.tif") as slide:
        assert (slide.read(0, 300, 200, 1000, 700).pixels == expected[200:900, 300:1300]).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("broken.svs", "unknown format"), ("unopenable.tiff", "compression: 52479")],
)
def test_slides_that_no_library_reads_are_refused_in_one_line(name, reason):
    with pytest.raises(UserError, match=f"{name}: .*{reason}"):
        open_slide(FOLDER / name)


def test_which_of_the_files_are_slides():
    names = ["boxes", "boxes_0", "broken", "cmu_small_region", "sm_image", "small", "tcga_ts1_j2k"]
    assert [name for name, _ in find_slides(FOLDER, 96, 0.972)] == [*names, "unreadable"]
    with_scale = [name for name, _ in find_slides(FOLDER, 96, 0.972, 0.25)]
    assert set(with_scale) == {*names, "unreadable", "kidney_plain"}


def test_a_slide_is_opened_again_after_each_error():
    with open_slide(FOLDER / "unreadable.svs") as slide:
        for _ in range(3):
            region = slide.read(0, 2, 3, 10, 12)
            assert region.failed.shape == (12, 10)
            assert region.failed.all()
            assert (region.pixels == np.uint8(255)).all()
