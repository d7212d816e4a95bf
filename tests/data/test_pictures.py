"""Compares what is read with the pixels that Pillow or tifffile wrote."""

import io
import itertools
import os
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from PIL.PngImagePlugin import putchunk

from bef_jax.data import pictures
from bef_jax.data.patch import Tiling
from bef_jax.errors import UserError


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_png(path, width, height, bits, colour_type, packed):
    """Writes a PNG by hand, because Pillow writes neither 16 bits of RGB nor a header alone."""
    size = np.array([width, height], ">u4").tobytes()
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        putchunk(file, b"IHDR", size + bytes([bits, colour_type, 0, 0, 0]))
        putchunk(file, b"IDAT", packed)
        putchunk(file, b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".PNG", ".tiff", ".bmp"])
def test_lossless_pictures_are_read_exactly(suffix, tmp_path):
    pixels = noise(100, 130)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    assert pictures.look(path)[:2] == (100, 130)
    np.testing.assert_array_equal(pictures.read(path), pixels)


def test_a_webp_is_read_exactly_and_laid_on_white(tmp_path):
    pixels = noise(100, 130, 4)
    pixels[:50, :, 3], pixels[50:, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True)
    found = pictures.read(tmp_path / "a.webp")
    assert (found[:50] == 255).all()
    np.testing.assert_array_equal(found[50:], pixels[50:, :, :3])


def test_a_large_webp_is_refused_by_its_header(tmp_path):
    Image.new("RGB", (5001, 5000)).save(tmp_path / "a.webp", quality=0, method=0)
    with pytest.raises(UserError, match="a WebP above 25,000,000 pixels; write it as PNG"):
        pictures.look(tmp_path / "a.webp")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_bytes_are_read_like_files(kind, tmp_path):
    file = io.BytesIO()
    Image.fromarray(noise(96, 100)).save(file, kind)
    (tmp_path / "a.tif").write_bytes(file.getvalue())
    assert pictures.look("row 3", content=file.getvalue()) == pictures.look(tmp_path / "a.tif")
    expected = pictures.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(pictures.read("row 3", content=file.getvalue()), expected)
    with pytest.raises(UserError, match="row 3: cannot be read as a picture"):
        pictures.read("row 3", content=file.getvalue()[:900])


def test_a_file_too_large_to_read_at_once_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.reading, "_SMALL", 1000)
    Image.fromarray(noise(96, 96)).save(tmp_path / "a.png")
    Image.fromarray(noise(96, 96)).save(tmp_path / "a.jpg")
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.png"), noise(96, 96))
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.jpg"), expected)


def test_threads_that_decode_leave_the_filters_of_warnings_as_they_were(tmp_path):
    """Lets the second thread begin before the first one ends, and end after it."""
    Image.fromarray(noise(96, 96)).save(tmp_path / "a.png")
    before, begun, ended = (
        list(warnings.filters),
        [threading.Event() for _ in "ab"],
        threading.Event(),
    )

    def read(number, awaited):
        def check(*_):
            begun[number].set()
            assert awaited.wait(10)

        return threading.Thread(target=pictures.read, args=(tmp_path / "a.png", check))

    first, second = read(0, begun[1]), read(1, ended)
    first.start()
    assert begun[0].wait(10)
    second.start()
    first.join()
    assert warnings.filters[0][0] == "ignore"  # for the second one
    ended.set()
    second.join()
    assert list(warnings.filters) == before


def test_a_jpeg_is_read_with_small_errors(tmp_path):
    pixels = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None, None], (96, 96, 3))
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pictures.read(tmp_path / "a.jpg").astype(int) - pixels).max() < 6


def test_tifffile_decodes_what_pillow_cannot(tmp_path):
    pixels = noise(96, 96)
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression="jpegxl", photometric="rgb",
                     compressionargs={"lossless": True})  # fmt: skip
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.tif"), pixels)


def test_grey_palette_and_transparency_become_rgb(tmp_path):
    grey = noise(96, 96)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pictures.read(tmp_path / "grey.png"), np.dstack([grey] * 3))
    palette = Image.fromarray(noise(96, 96)).quantize(16)
    palette.save(tmp_path / "palette.png")
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(pictures.read(tmp_path / "palette.png"), expected)
    clear = noise(96, 96, 4)
    clear[:, :, 3] = 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (pictures.read(tmp_path / "clear.png") == 255).all()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b"no picture"), "cannot be read as a picture"),
        (lambda path: Image.fromarray(noise(96, 96)[:, :, 0].astype(np.uint16)).save(path), "bits"),
    ],
    ids=["not a picture", "16 bits"],
)
def test_the_error_names_the_refused_picture(write, words, tmp_path):
    path = tmp_path / "a file.png"
    write(path)
    with pytest.raises(UserError, match=words) as error:
        pictures.read(path)
    assert "a file.png" in str(error.value)


@pytest.mark.parametrize("ask", [pictures.look, pictures.read])
def test_a_picture_smaller_than_a_patch_is_refused_with_both_sizes(ask, tmp_path):
    path = tmp_path / "a file.png"
    Image.fromarray(noise(95, 200)).save(path)
    ask(path, pictures.fit_for(95))
    with pytest.raises(UserError, match=r"a file\.png: 200x95 pixels; .* patches of 96x96"):
        ask(path, pictures.fit_for(96))
    write_png(path, 10_001, 10_000, bits=1, colour_type=0, packed=b"")
    with pytest.raises(UserError, match="above 100,000,000 pixels"):
        ask(path, pictures.fit_for(96))


def test_a_picture_of_gigabytes_is_refused_by_its_header(tmp_path):
    """Writes a file of some hundred bytes that declares 100,000 x 100,000 pixels."""
    with tifffile.TiffWriter(tmp_path / "bomb.tif", bigtiff=True) as tif:
        tif.write(iter([b"x"]), shape=(100_000, 100_000, 3), dtype=np.uint8, photometric="rgb",
                  compression="zlib", tile=(100_000, 100_000))  # fmt: skip
    with pytest.raises(UserError, match="above 100,000,000 pixels"):
        pictures.look(tmp_path / "bomb.tif")


# The first is just above the limit; the second is also above Pillow's own, 179 million pixels.
@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (20_000, 20_000)])
def test_a_png_bomb_is_refused_for_its_size(width, height, tmp_path):
    write_png(tmp_path / "bomb.png", width, height, bits=1, colour_type=0, packed=b"")
    for ask in (pictures.look, pictures.read):
        with pytest.raises(UserError, match="above 100,000,000 pixels"):
            ask(tmp_path / "bomb.png")


def test_a_png_of_exactly_the_largest_size_is_accepted(tmp_path):
    write_png(tmp_path / "a.png", 10_000, 10_000, bits=1, colour_type=0, packed=b"")
    assert pictures.look(tmp_path / "a.png")[:2] == (10_000, 10_000)


def test_a_truncated_picture_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(UserError, match=r"a\.png"):
        pictures.read(path)


def test_an_unknown_compression_is_the_reason_whatever_the_size(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8, 3), np.uint8), photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        tif.pages[0].tags["Compression"].overwrite(52479)
    with pytest.raises(UserError, match="its compression, 52479, is unknown"):
        pictures.look(tmp_path / "a.tif", pictures.fit_for(96))


def test_the_reason_comes_from_the_decoder_that_knows_the_format(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(96, 96)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match="truncated") as error:
        pictures.read(path)
    assert "TIFF" not in str(error.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_another_format_is_refused_under_any_suffix(suffix, tmp_path, monkeypatch):
    """Pillow would give an EPS to Ghostscript. Here `gs` is a script that leaves a file."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / f"eps{suffix}"
    Image.fromarray(noise(96, 96)).save(path, "EPS")
    for ask in (pictures.look, pictures.read):
        with pytest.raises(UserError, match="not a PNG, JPEG, TIFF, WebP or BMP"):
            ask(path)
    assert not (tmp_path / "was-run").exists()


CHANNELS = {2: 3, 6: 4}  # of RGB and RGBA, by PNG's colour type


def as_png_of_16_bits(path, colour_type):
    """Writes 96 rows of one colour, each with filter 0."""
    row = b"\0" + bytes(2 * CHANNELS[colour_type] * 96)
    write_png(path, 96, 96, 16, colour_type, zlib.compress(row * 96))


def as_tiff(path, pixels, **options):
    tifffile.imwrite(path, pixels, photometric="rgb", **options)


UINT16 = noise(96, 96).astype(np.uint16)
NOT_OF_8_BITS = {
    "RGB.png": lambda path: as_png_of_16_bits(path, 2),
    "RGBA.png": lambda path: as_png_of_16_bits(path, 6),
    "raw.tif": lambda path: as_tiff(path, UINT16),
    "deflate.tif": lambda path: as_tiff(path, UINT16, compression="zlib"),
    "zstd.tif": lambda path: as_tiff(path, UINT16, compression="zstd"),
    "planar.tif": lambda path: as_tiff(path, UINT16.transpose(2, 0, 1), planarconfig="separate"),
    "signed.tif": lambda path: as_tiff(path, UINT16.astype(np.int8)),
    "float.tif": lambda path: as_tiff(path, UINT16.astype(np.float32)),
}


@pytest.mark.parametrize("name", NOT_OF_8_BITS)
def test_pixels_that_are_not_unsigned_8_bits_are_refused(name, tmp_path):
    NOT_OF_8_BITS[name](tmp_path / name)
    for ask in (pictures.look, pictures.read):
        with pytest.raises(UserError, match="to RGB of 8 bits"):
            ask(tmp_path / name)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planar_pixels_are_read_if_pillow_knows_the_compression(compression, tmp_path):
    pixels, path = noise(96, 130), tmp_path / "planar.tif"
    as_tiff(path, pixels.transpose(2, 0, 1), planarconfig="separate", compression=compression)
    np.testing.assert_array_equal(pictures.read(path), pixels)


def test_planar_pixels_that_only_tifffile_can_decode_are_refused(tmp_path):
    pixels, path = noise(96, 130), tmp_path / "planar.tif"
    as_tiff(path, pixels.transpose(2, 0, 1), planarconfig="separate", compression="jpegxl")
    for ask in (pictures.look, pictures.read):
        with pytest.raises(UserError, match="convert it to RGB"):
            ask(path)


def test_colours_other_than_rgb_are_refused_if_pillow_cannot_convert_them(tmp_path):
    path = tmp_path / "a.tif"
    grey = np.ascontiguousarray(noise(96, 96)[:, :, 0])
    tifffile.imwrite(path, grey, photometric="miniswhite", compression="jpegxl")
    with pytest.raises(UserError, match="its colours are not RGB"):
        pictures.read(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_transparent_colour_becomes_white(mode, tmp_path):
    pixels = np.zeros((96, 96, 3), np.uint8) + 70
    pixels[:48] = 200
    image = Image.fromarray(pixels)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    colour = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=colour)
    found = pictures.read(tmp_path / "a.png")
    assert (found[:48] == 255).all()
    assert (found[48:] == 70).all()


# A picture that looks different in each of its eight orientations.
TURNED = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None, None], (96, 130, 3)).copy()
TURNED[:48, :65] = 250


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "pillow.tif", "tifffile.tif"])
def test_pictures_are_turned_as_viewers_turn_them(name, orientation, tmp_path):
    """Compares with Pillow's `exif_transpose`, for which the tag is set by hand."""
    path, image = tmp_path / name, Image.fromarray(TURNED)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    if name == "tifffile.tif":
        tag = [(0x0112, "H", 1, orientation, True)]
        as_tiff(path, TURNED, compression="jpegxl", extratags=tag)
    else:
        Image.fromarray(TURNED).save(path, exif=image.getexif(), quality=100)
    found = pictures.read(path)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() < 8  # the loss of a JPEG


def test_a_tiff_of_many_samples_is_refused_by_its_header(tmp_path):
    path = tmp_path / "a.tif"
    pixels = np.zeros((200, 200, 3000), np.uint8)
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    with pytest.raises(UserError, match="convert it to RGB"):
        pictures.look(path)


def test_a_tile_larger_than_its_picture_is_refused_by_its_header(tmp_path):
    path = tmp_path / "a.tif"
    side = 16_000
    with tifffile.TiffWriter(path) as tif:
        tile = zlib.compress(bytes(16))
        tif.write(iter([tile]), shape=(96, 96, 3), dtype=np.uint8, photometric="rgb",
                  compression="zlib", tile=(side, side))  # fmt: skip
    with pytest.raises(UserError, match="its tiles are above"):
        pictures.read(path)


MEASURE = """
import resource, sys
from pathlib import Path
from bef_jax.data import pictures
from bef_jax.data.patch import Tiling
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
pixels = pictures.read(Path(sys.argv[1]))
assert pixels.shape[:2] == (10_000, 10_000)
sum(int(tile.pixels[0, 0, 0]) for tile in pictures.tiles(pixels, Tiling(96, 32, 96)))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("colour_type", CHANNELS, ids=["RGB", "RGBA"])
def test_the_largest_picture_takes_less_than_a_gib(colour_type, tmp_path):
    path, packer = tmp_path / "a.png", zlib.compressobj(1)
    row = bytes(1 + CHANNELS[colour_type] * 10_000)
    packed = b"".join([*(packer.compress(row) for _ in range(10_000)), packer.flush()])
    write_png(path, 10_000, 10_000, 8, colour_type, packed)
    words = [sys.executable, "-W", "error", "-c", MEASURE, path]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1024
    assert not result.stderr


@pytest.mark.parametrize(
    ("unit", "resolution", "mpp"),
    [("CENTIMETER", 10_000 / 0.243, 0.243), ("INCH", 25_400 / 0.5, 0.5), ("INCH", 300, None),
     ("NONE", 40_000, None), (None, None, None)],
)  # fmt: skip
@pytest.mark.parametrize("compression", [None, "jpegxl"])
def test_the_scale_of_a_tiff_is_read_if_it_is_one_of_a_microscope(
    unit, resolution, mpp, compression, tmp_path
):
    tags = {"resolution": (resolution, resolution), "resolutionunit": unit} if unit else {}
    as_tiff(tmp_path / "a.tif", noise(96, 96), compression=compression, **tags)
    found = pictures.look(tmp_path / "a.tif").mpp
    assert found == (mpp and pytest.approx(mpp, rel=1e-3))


def test_a_folder_and_all_below_it_are_searched_in_sorted_order(tmp_path):
    names = ["b.png", "a/z.TIF", "a/b/c.jpeg", "a b, \u00e4.png"]
    for name in [*names, "notes.txt", "._b.png", ".hidden/c.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert pictures.find(tmp_path) == sorted(tmp_path / name for name in names)
    (tmp_path / "a/deep").mkdir()
    (tmp_path / "a/deep/loop.png").symlink_to("loop.png")
    assert (tmp_path / "a/deep/loop.png") in pictures.find(tmp_path)  # its error comes in reading
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        pictures.find(tmp_path / "empty")


@pytest.mark.parametrize("length", [96, 97, 128, 150, 2000])
@pytest.mark.parametrize("stride", [7, 16, 32])
@pytest.mark.parametrize("center", [32, 33, 96])
def test_squares_cover_every_pixel_and_stay_inside(length, stride, center):
    found = pictures.positions(length, Tiling(96, center, stride))
    assert found == sorted(set(found)) and found[0] == 0 and found[-1] == length - center
    covered = np.zeros(length, int)
    for start in found:
        covered[start : start + center] += 1
    assert covered.min() >= 1
    if stride == center:
        assert (covered[: found[-1]] == 1).all()


@pytest.mark.parametrize(
    ("side", "center", "size"), [(96, 32, (130, 100)), (64, 64, (64, 95)), (97, 33, (97, 200))]
)
def test_tiles_are_windows_around_their_squares(side, center, size):
    """Uses a picture whose pixels hold their row and column, and a mirror made by hand."""
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)

    def mirrored(index, length):
        index = abs(index)
        return index if index < length else 2 * (length - 1) - index

    tiles = list(pictures.tiles(pixels, Tiling(side, center, center)))
    starts = [[*range(0, length - center, center), length - center] for length in size]
    assert [(tile.y, tile.x) for tile in tiles] == list(itertools.product(*starts))
    margin, last = (side - center) // 2, side - 1
    for tile in tiles:
        for row, column in [(0, 0), (32, 32), (63, 63), (last, last), (0, last), (50, 7)]:
            place = tile.y + row - margin, tile.x + column - margin
            expected = tuple(map(mirrored, place, size))
            assert tuple(tile.pixels[row, column, :2]) == expected
        assert tile.pixels.shape == (side, side, 3)


def test_tiles_without_a_center_lie_side_by_side():
    """Four patches in a row are cut again into the same four, and none shows a mirror image."""
    patches = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    tiles = list(pictures.tiles(np.concatenate(patches, axis=1), Tiling(64, 64, 64)))
    assert [(tile.y, tile.x) for tile in tiles] == [(0, 0), (0, 64), (0, 128), (0, 192)]
    np.testing.assert_array_equal([tile.pixels for tile in tiles], patches)
