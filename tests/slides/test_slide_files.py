"""Checks the slides that tests make against OpenSlide."""

import numpy as np
import pytest

from tests.slides.slide_files import break_tile, tissue_pixels, write_pyramid, write_sparse

openslide = pytest.importorskip("openslide")


@pytest.mark.parametrize("aperio", [False, True])
@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_openslide_opens_a_pyramid(aperio, compression, tmp_path):
    pixels = tissue_pixels(1030, 700)
    path = write_pyramid(
        tmp_path / "a.svs", pixels, 0.25, (1, 2, 4.016), compression=compression, aperio=aperio
    )
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == ("aperio" if aperio else "generic-tiff")
        assert slide.level_dimensions == ((1030, 700), (515, 350), (256, 174))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        found = np.asarray(slide.read_region((300, 200), 0, (512, 400)))[..., :3]
        limit = 40 if compression == "jpeg" else 0
        assert abs(found.astype(int) - pixels[200:600, 300:812]).max() <= limit


def test_scales_may_differ_and_alpha_is_kept(tmp_path):
    pixels = np.dstack([tissue_pixels(300, 300), np.full((300, 300), 255, np.uint8)])
    pixels[100:200, 100:200, 3] = 0
    path = write_pyramid(tmp_path / "a.tif", pixels, (0.25, 0.26), (1, (149, 150)), 64, "deflate")
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions[1] == (149, 150)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.26)
        found = np.asarray(slide.read_region((0, 0), 0, (300, 300)))
        assert (found[..., 3] == pixels[..., 3]).all()


def test_a_sparse_slide_is_large_and_its_file_small(tmp_path):
    path = write_sparse(tmp_path / "a.tif", 40_000)
    assert path.stat().st_size < 100e6
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (40_000, 40_000)
        assert slide.level_dimensions[2] == (2500, 2500)
        saturation = [
            np.ptp(np.asarray(slide.read_region(place, 2, (64, 64)))[..., :3], axis=-1).max()
            for place in [(0, 0), (14_000, 14_000)]
        ]
        assert saturation[0] < 10 < saturation[1]


def test_a_broken_tile_cannot_be_read_and_others_can(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(1000, 1000), 0.25)
    break_tile(path, 1, 0, 1)
    with openslide.OpenSlide(path) as slide:
        slide.read_region((0, 0), 1, (256, 256))
        slide.read_region((0, 0), 0, (1000, 1000))
        with pytest.raises(openslide.OpenSlideError):
            slide.read_region((512, 0), 1, (100, 100))
