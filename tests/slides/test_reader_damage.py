"""Checks that damaged slides cost the pixels that are damaged, or one line."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bef_jax.errors import UserError
from bef_jax.slides import reader
from bef_jax.slides.reader import open_slide
from bef_jax.slides.readers import with_openslide
from bef_jax.slides.readers.base import levels_of
from tests.slides.opened import READERS, opened
from tests.slides.slide_files import (
    break_tile,
    set_tag,
    tissue_pixels,
    write_flat,
    write_pyramid,
)
from tests.special_files import MAKERS, make_special


@pytest.mark.parametrize("library", READERS)
@pytest.mark.parametrize(("downsamples", "level"), [((1, 2, 4), 1), ((1, (499, 498)), 1)])
def test_only_the_pixels_of_a_tile_that_cannot_be_decoded_fail(
    library, downsamples, level, tmp_path
):
    pixels = tissue_pixels(1000, 1000)
    path = write_pyramid(tmp_path / "a.tif", pixels, 0.25, downsamples, 128)
    with opened(library, path) as slide:
        expected = slide.read(level, 0, 0, 490, 490).pixels
    break_tile(path, level, 1, 2)
    bad = np.zeros((490, 490), bool)
    bad[128:256, 256:384] = True
    # At a factor that is no whole number, OpenSlide's pixels are a mix with those beside them.
    margin = 32 if library == "openslide" and downsamples[1] != 2 else 0
    near = np.zeros((490, 490), bool)
    near[128 - margin : 256 + margin, 256 - margin : 384 + margin] = True
    with opened(library, path) as slide:
        for _ in range(2):
            region = slide.read(level, 0, 0, 490, 490)
            assert region.failed[bad].all()
            assert not (region.failed & ~near).any()
            good = ~region.failed
            assert abs(region.pixels[good].astype(int) - expected[good]).max() <= (
                12 if margin else 0
            )
            assert slide.read(level, 0, 0, 256, 100).failed is None
            assert slide.read(level, 260, 130, 20, 20).failed.all()


def test_after_an_error_later_reads_need_no_new_handle(tmp_path, monkeypatch):
    openslide = pytest.importorskip("openslide")
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(1000, 1000), 0.25)
    break_tile(path, 0, 0, 0)
    with open_slide(path) as slide:
        assert slide.read(0, 0, 0, 300, 300).failed is not None
        monkeypatch.setattr(openslide, "OpenSlide", None)
        assert slide.read(0, 300, 300, 300, 300).failed is None


def test_what_cannot_be_decoded_is_halved_where_tiles_are_unknown(tmp_path, monkeypatch):
    pytest.importorskip("openslide")
    monkeypatch.setattr(with_openslide, "_TILED", ())
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(1000, 1000), 0.25, tile=240)
    break_tile(path, 0, 1, 1)
    with open_slide(path) as slide:
        failed = slide.read(0, 100, 100, 800, 800).failed
    bad = np.zeros((800, 800), bool)
    bad[224 - 100 : 480 - 100, 224 - 100 : 480 - 100] = True  # the tile, up to multiples of 32
    assert (failed == bad).all()


def test_another_threads_error_costs_no_good_pixels(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(1500, 1500), 0.25)
    break_tile(path, 0, 2, 2)
    boxes = [(0, x, y, 200, 200) for x in range(0, 1300, 100) for y in range(0, 1300, 100)]
    touched = [x < 768 and x + 200 > 512 and y < 768 and y + 200 > 512 for _, x, y, _, _ in boxes]
    for library in READERS:
        with opened(library, path) as slide, ThreadPoolExecutor(8) as pool:
            regions = pool.map(lambda box: slide.read(*box), boxes)
            assert [region.failed is not None for region in regions] == touched


def test_a_slide_that_vanishes_is_one_line(tmp_path):
    pytest.importorskip("openslide")
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(1000, 1000), 0.25)
    break_tile(path, 0, 0, 0)
    with open_slide(path) as slide:
        path.unlink()
        with pytest.raises(UserError, match=r"a.tif: can no longer be opened \(.*\); run it again"):
            slide.read(0, 0, 0, 100, 100)
    write_pyramid(path, tissue_pixels(1000, 1000), 0.25)
    break_tile(path, 0, 0, 0)
    with open_slide(path) as slide:
        write_pyramid(path, tissue_pixels(900, 900), 0.25)
        break_tile(path, 0, 0, 0)
        with pytest.raises(UserError, match=r"a.tif: changed while it was read"):
            for x in (0, 300, 600):
                slide.read(0, x, 0, 100, 100)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_no_regular_file_is_one_line(kind, tmp_path):
    path = make_special(kind, tmp_path / "a.svs")
    with pytest.raises(UserError, match=r"a\.svs: "):
        open_slide(path)


@pytest.mark.parametrize("suffix", [*reader.SUFFIXES, ".tif", ".png", ""])
@pytest.mark.parametrize("content", [b"", b"II*\0", b"II+\0", os.urandom(3000), b"\x89PNG\r\n"])
def test_files_that_are_no_slides_are_one_line(suffix, content, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a{suffix}: "):
        open_slide(path)
    assert reader.is_slide(path, 96, 0.972) == (suffix in reader.SUFFIXES)


def test_mrxs_without_its_folder_names_the_folder(tmp_path):
    pytest.importorskip("openslide")
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=r"its folder .*/a is missing; put it beside the file"):
        open_slide(tmp_path / "a.mrxs")


@pytest.mark.parametrize("place", [10**6, 2**32 - 1])
def test_tiles_outside_of_the_file_cannot_be_decoded(place, tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(512, 512), 0.25, (1,))
    set_tag(path, "TileOffsets", 1, place)
    for library in READERS:
        with opened(library, path) as slide:
            failed = slide.read(0, 0, 0, 512, 512).failed
            assert failed[:256, 256:].all()
            assert failed.sum() == 256**2


@pytest.mark.parametrize("length", [10**6, 2**31 - 1])
def test_a_slide_that_claims_to_be_huge_is_opened_without_memory(length, tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(512, 512), 0.25, (1,))
    set_tag(path, "ImageWidth", 0, length)
    set_tag(path, "ImageLength", 0, length)
    for library in READERS:
        with opened(library, path) as slide:
            assert slide.levels[0][:2] == (length, length)
            assert slide.read(0, 0, 0, 100, 100).failed is None
            assert slide.read(0, length - 100, length - 100, 100, 100).failed.all()


def test_a_page_without_pixels_is_one_line(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(512, 512), 0.25, (1,))
    set_tag(path, "ImageWidth", 0, 0)
    with pytest.raises(UserError, match=r"a\.tif: "):
        open_slide(path)


def test_a_tile_that_claims_another_size_is_not_decoded(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(512, 512), 0.25, (1,))
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0\0\x11\x08\1\0\1\0")
    content[frame + 5 : frame + 9] = b"\xff\0\xff\0"
    path.write_bytes(content)
    for library in READERS:
        with opened(library, path) as slide:
            assert slide.read(0, 0, 0, 512, 512).failed.sum() == 256**2


@pytest.mark.parametrize("side", [65_520, 2**31 - 16])
def test_tiles_that_claim_to_be_huge_are_refused(side, tmp_path):
    # OpenSlide would take their memory, or end the process.
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(512, 512), 0.25, (1,))
    set_tag(path, "TileWidth", 0, side)
    set_tag(path, "TileLength", 0, side)
    for library in READERS:
        with pytest.raises(UserError, match=r"a\.tif: its .*tiles are above 100,000,000 pixels"):
            opened(library, path)


def test_levels_of_other_shapes_are_refused():
    path = Path("a.svs")
    assert len(levels_of(path, [(1000, 800), (31, 25), (3, 2), (1, 1)])) == 4
    with pytest.raises(UserError, match=r"a\.svs: damaged \(its levels have other shapes\)"):
        levels_of(path, [(512, 2**20), (256, 256)])
    for sizes in ([], [(0, 7)], [(8, 8), (4, 0)]):
        with pytest.raises(UserError, match=r"a\.svs: has no pixels"):
            levels_of(path, sizes)


def test_strips_above_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bef_jax.slides.readers.with_tifffile.LIMIT", 10_000)
    path = write_flat(tmp_path / "a.tif", tissue_pixels(300, 200), rows=200)
    with pytest.raises(UserError, match=r"a.tif: its strips or tiles are above 10,000 pixels"):
        open_slide(path)


def test_without_openslide_tiffs_are_read_and_others_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    path = write_pyramid(tmp_path / "a.svs", tissue_pixels(600, 600), 0.25, aperio=True)
    with open_slide(path) as slide:
        assert (slide.reader, len(slide.levels), slide.mpp) == ("tifffile svs", 3, 0.25)
    path.write_bytes(b"DICM" * 100)
    with pytest.raises(UserError, match=r"OpenSlide is missing, which reads it; pip"):
        open_slide(path)


@pytest.mark.parametrize("name", ["an emoji \N{MICROSCOPE}.tif", os.fsdecode(b"not utf8 \xff.tif")])
def test_any_name_can_be_read(name, tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(300, 300), 0.25, tile=64)
    path.rename(tmp_path / name)
    for library in READERS:
        with opened(library, tmp_path / name) as slide:
            assert slide.read(0, 0, 0, 300, 300).failed is None
