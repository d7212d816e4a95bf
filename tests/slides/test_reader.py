"""Checks that slides are read as their pixels were written, whatever library reads them."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image

from bef_jax.errors import UserError
from bef_jax.slides import reader
from bef_jax.slides.reader import open_slide
from tests.slides.opened import READERS, opened
from tests.slides.slide_files import (
    level_sizes,
    set_tag,
    tissue_pixels,
    write_flat,
    write_pyramid,
)

BOXES = [(0, 0, 90, 70), (1, 1, 64, 64), (101, 57, 133, 99), (37, 130, 300, 60), (250, 250, 1, 1)]


def on_white(pixels):
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


# ---- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", READERS)
@pytest.mark.parametrize(("compression", "limit"), [("deflate", 0), ("jpeg", 40)])
def test_regions_of_levels_are_the_pixels_that_were_written(library, compression, limit, tmp_path):
    pixels = tissue_pixels(1400, 1300)
    path = write_pyramid(tmp_path / "a.tif", pixels, 0.25, tile=128, compression=compression)
    with opened(library, path) as slide:
        assert slide.reader.startswith(library)
        assert slide.mpp == pytest.approx(0.25)
        for number, level in enumerate(slide.levels):
            assert level == (1400 >> number, 1300 >> number, (1 << number, 1 << number))
            expected = np.asarray(Image.fromarray(pixels).resize(level[:2], Image.Resampling.BOX))
            for x, y, width, height in BOXES:
                region = slide.read(number, x, y, min(width, level.width - x), height)
                wanted = expected[y : y + height, x : x + width]
                assert region.failed is None
                assert region.pixels.dtype == np.uint8
                assert region.pixels.shape == wanted.shape
                assert abs(region.pixels.astype(int) - wanted).max() <= limit


@pytest.mark.parametrize("library", READERS)
def test_levels_whose_sizes_are_no_whole_shares_are_read_in_place(library, tmp_path):
    # OpenSlide's places are those of level 0, and its factor is a mean of both axes.
    pixels = tissue_pixels(2000, 1500)
    sizes = [(2000, 1500), (980, 750), *level_sizes(2000, 1500, [4.016, 31.7])]
    path = write_pyramid(tmp_path / "a.tif", pixels, 0.25, sizes, compression="deflate")
    with opened(library, path) as slide:
        assert [level[:2] for level in slide.levels] == sizes
        assert slide.levels[1].downsample == (2000 / 980, 2.0)
        for number, size in enumerate(sizes):
            expected = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
            x, y = size[0] * 4 // 5, size[1] * 4 // 5
            found = slide.read(number, x, y, size[0] - x, size[1] - y).pixels
            # A shift by a pixel is seen: the pixels change by more than that.
            off = abs(found.astype(int) - expected[y:, x:]).mean()
            shifted = abs(found.astype(int) - expected[y - 1 : -1, x:]).mean()
            assert off < (shifted / 3 if number else 1e-9)


@pytest.mark.parametrize("library", READERS)
def test_what_is_transparent_is_laid_on_white(library, tmp_path):
    pixels = np.dstack([tissue_pixels(300, 300), np.full((300, 300), 255, np.uint8)])
    pixels[100:200, 100:200, 3] = 0
    pixels[200:, 200:, 3] = 128
    path = write_pyramid(tmp_path / "a.tif", pixels, 0.25, (1,), 64, "deflate")
    with opened(library, path) as slide:
        found = slide.read(0, 0, 0, 300, 300).pixels
        assert abs(found - on_white(pixels)).max() <= 2
        assert (found[100:200, 100:200] == 255).all()
        assert (slide.read(0, 0, 0, 50, 50).pixels == pixels[:50, :50, :3]).all()


def test_threads_read_the_same_pixels_as_one(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(1500, 1500), 0.25)
    boxes = [(0, x, y, 300, 300) for x in range(0, 1200, 200) for y in range(0, 1200, 200)]
    for library in READERS:
        with opened(library, path) as slide:
            expected = [slide.read(*box).pixels for box in boxes]
        with opened(library, path) as slide, ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda box: slide.read(*box).pixels, boxes)
            assert all((a == b).all() for a, b in zip(found, expected, strict=True))


# ---- scale --------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", READERS)
@pytest.mark.parametrize("aperio", [False, True])
def test_the_scale_is_what_the_slide_says_unless_the_user_gives_another(library, aperio, tmp_path):
    pixels = tissue_pixels(300, 300)
    path = write_pyramid(tmp_path / "a.svs", pixels, 0.499, (1, 2), 64, aperio=aperio)
    with opened(library, path) as slide:
        assert slide.mpp == pytest.approx(0.499)
    with opened(library, path, 0.25) as slide:
        assert slide.mpp == 0.25
    path = write_pyramid(tmp_path / "b.svs", pixels, None, (1, 2), 64, aperio=aperio)
    with opened(library, path) as slide:
        assert slide.mpp is None


@pytest.mark.parametrize("library", READERS)
def test_pixels_that_are_not_square_are_warned_of_and_then_refused(library, tmp_path, caplog):
    pixels = tissue_pixels(300, 300)

    def written(y):
        return write_pyramid(tmp_path / "a.tif", pixels, (0.25, 0.25 * y), (1,), 64)

    with opened(library, written(1.005)) as slide:
        assert slide.mpp == pytest.approx(0.25 * 1.005**0.5)
    assert not caplog.records
    with opened(library, written(1.05)) as slide:
        assert slide.mpp == pytest.approx(0.25 * 1.05**0.5, abs=1e-4)
    assert "not quite square" in caplog.text
    path = written(1.2)
    with pytest.raises(UserError, match=r"a.tif: its pixels are not square \(0.25 x 0.3 um\)"):
        opened(library, path)
    with opened(library, path, 0.3) as slide:
        assert slide.mpp == 0.3


@pytest.mark.parametrize("said", ["0", "-0.25", "nan", "1e999", "much", "0.25.3", "1e-300"])
def test_a_scale_that_is_no_positive_number_counts_as_none(said, tmp_path):
    path = write_pyramid(tmp_path / "a.svs", tissue_pixels(300, 300), said, (1,), 64, aperio=True)
    for library in READERS:
        with opened(library, path) as slide:
            assert slide.mpp is None


@pytest.mark.parametrize(
    ("unit", "factor"), [("", 1), ('PhysicalSizeXUnit="µm" ', 1), ('PhysicalSizeXUnit="nm" ', 1e-3)]
)
def test_the_scale_of_an_ome_tiff_is_in_its_description(unit, factor, tmp_path):
    path = tmp_path / "a.ome.tif"
    sizes = f'PhysicalSizeX="{0.5 / factor}" {unit}PhysicalSizeY="{0.5 / factor}"'
    ome = f'<?xml version="1.0"?><OME><Image><Pixels {sizes}/></Image></OME>'
    tifffile.imwrite(
        path, tissue_pixels(300, 300), description=ome.encode(), photometric="rgb", metadata=None
    )
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)


# ---- flat TIFF files and their colours ----------------------------------------------------------


def as_rgb(pixels):
    return np.repeat(pixels[..., None], 3, -1)


GRAY = tissue_pixels(200, 170)[..., 0]
COLOURS = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16)
ALPHA = np.dstack([tissue_pixels(200, 170), GRAY])
KINDS = {
    "rgb": (tissue_pixels(200, 170), {}, tissue_pixels(200, 170)),
    "lzw": (tissue_pixels(200, 170), {"compression": "lzw"}, tissue_pixels(200, 170)),
    "uncompressed": (tissue_pixels(200, 170), {"compression": None}, tissue_pixels(200, 170)),
    "one strip": (tissue_pixels(200, 170), {"rows": 170}, tissue_pixels(200, 170)),
    "gray": (GRAY, {}, as_rgb(GRAY)),
    "white is zero": (GRAY, {"photometric": "miniswhite"}, as_rgb(255 - GRAY)),
    "palette": (GRAY, {"photometric": "palette", "colormap": COLOURS << 8}, COLOURS.T[GRAY]),
    "alpha": (ALPHA, {"extrasamples": ["unassalpha"]}, on_white(ALPHA)),
    "unused": (ALPHA, {"extrasamples": ["unspecified"]}, ALPHA[..., :3]),
    "planes": (
        np.moveaxis(tissue_pixels(200, 170), -1, 0),
        {"planarconfig": "separate"},
        tissue_pixels(200, 170),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_flat_tiffs_are_read_with_their_colours(kind, tmp_path):
    pixels, options, expected = KINDS[kind]
    path = write_flat(tmp_path / "a.tif", pixels, 0.5, **options)
    with open_slide(path) as slide:
        assert slide.reader == "tifffile tiff"
        assert slide.levels == ((200, 170, (1.0, 1.0)),)
        assert slide.mpp == pytest.approx(0.5)
        for x, y, width, height in [(0, 0, 200, 170), (31, 15, 100, 18), (199, 169, 1, 1)]:
            region = slide.read(0, x, y, width, height)
            assert region.failed is None
            wanted = expected[y : y + height, x : x + width]
            assert abs(region.pixels - np.asarray(wanted, float)).max() <= (kind == "alpha")


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (np.zeros((99, 99, 3), np.uint16), {}, "its pixels do not have 8 bits"),
        (np.zeros((99, 99, 4), np.uint8), {"photometric": "separated"}, "its colours are not RGB"),
        (tissue_pixels(99, 99), {"extratags": [(274, 3, 1, 6, False)]}, "its Orientation tag"),
    ],
)
def test_other_tiffs_are_refused_in_one_line(pixels, options, reason, tmp_path):
    path = write_flat(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(UserError, match=f"a.tif: {reason}.*; convert it to a tiled RGB TIFF"):
        open_slide(path)


def test_subifds_are_levels_and_thumbnails_are_not(tmp_path):
    pixels = tissue_pixels(400, 400)
    options = {"photometric": "rgb", "metadata": None, "compression": "deflate"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(pixels, subifds=2, **options)
        tif.write(pixels[::2, ::2], subfiletype=1, **options)
        tif.write(pixels[::4, ::4], subfiletype=1, **options)
        tif.write(pixels[::8, ::8], subfiletype=1, **options)  # a thumbnail
    with open_slide(tmp_path / "a.tif") as slide:
        assert [level.width for level in slide.levels] == [400, 200, 100]
        assert (slide.read(2, 10, 20, 30, 30).pixels == pixels[::4, ::4][20:50, 10:40]).all()


def test_tiles_that_were_not_written_are_white(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels(512, 512), 0.25, (1,))
    set_tag(path, "TileByteCounts", 1, 0)
    for library in READERS:
        with opened(library, path) as slide:
            region = slide.read(0, 0, 0, 512, 512)
            assert region.failed is None
            assert (region.pixels[:256, 256:] == 255).all()
            assert (region.pixels[:256, :256] < 255).any()


# ---- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_picture_is_a_slide_of_one_level(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(tissue_pixels(300, 200)).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    with open_slide(path) as slide:
        assert slide.levels == ((300, 200, (1.0, 1.0)),)
        assert slide.mpp is None
        region = slide.read(0, 20, 30, 250, 100)
        assert (region.pixels == expected[30:130, 20:270]).all()
        assert region.failed is None
    with open_slide(path, 0.25) as slide:
        assert slide.mpp == 0.25


def test_a_picture_is_turned_and_laid_on_white(tmp_path):
    pixels = ALPHA
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.levels[0][:2] == (170, 200)
        found = slide.read(0, 0, 0, 170, 200).pixels
        assert abs(found - np.rot90(on_white(pixels), -1)).max() <= 1


def test_a_picture_above_pillows_limit_is_read_and_a_larger_one_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(tissue_pixels(300, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr("bef_jax.data.pictures.LIMIT", 50_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reader.is_slide(path, 96)
        with open_slide(path) as slide:
            assert (slide.read(0, 0, 0, 300, 200).pixels == tissue_pixels(300, 200)).all()
    monkeypatch.setattr("bef_jax.slides.readers.of_picture._LIMIT", 50_000)
    with pytest.raises(UserError, match=r"300x200 pixels are above 50,000.*tiled TIFF"):
        open_slide(path)


def test_no_room_for_a_pictures_pixels_is_one_line(tmp_path, monkeypatch):
    Image.new("L", (300, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(
        "tempfile.TemporaryFile",
        lambda: open("/dev/full", "r+b", buffering=0),  # noqa: SIM115
    )
    with pytest.raises(UserError, match=r"cannot be kept in .*No space left.*TMPDIR"):
        open_slide(tmp_path / "a.png")
