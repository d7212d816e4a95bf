import numpy as np
import pytest
import tifffile
from PIL import Image

from bef_jax.data import pictures
from bef_jax.errors import UserError


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".PNG", ".tiff"])
def test_lossless_pictures_come_back_to_the_bit(suffix, tmp_path):
    pixels = noise(100, 130)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    assert pictures.size(path) == (100, 130)
    np.testing.assert_array_equal(pictures.read(path), pixels)


def test_a_jpeg_is_near(tmp_path):
    pixels = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None, None], (96, 96, 3))
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pictures.read(tmp_path / "a.jpg").astype(int) - pixels).max() < 6


def test_what_pillow_cannot_decode_tifffile_does(tmp_path):
    pixels = noise(96, 96)
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression="zstd", photometric="rgb")
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
        (lambda path: Image.fromarray(noise(95, 200)).save(path), "200x95 pixels"),
        (lambda path: Image.fromarray(noise(96, 96)[:, :, 0].astype(np.uint16)).save(path), "8 bi"),
    ],
)
def test_what_is_no_patch_is_refused_by_its_name(write, words, tmp_path):
    path = tmp_path / "a file.png"
    write(path)
    with pytest.raises(UserError, match=words) as error:
        pictures.read(path)
    assert "a file.png" in str(error.value)


def test_a_picture_of_gigabytes_is_refused_by_its_header(tmp_path):
    """Of 100,000 x 100,000 pixels, which some hundred bytes declare."""
    with tifffile.TiffWriter(tmp_path / "bomb.tif", bigtiff=True) as tif:
        tif.write(iter([b"x"]), shape=(100_000, 100_000, 3), dtype=np.uint8, photometric="rgb",
                  compression="zlib", tile=(100_000 // 16 * 16, 100_000 // 16 * 16))  # fmt: skip
    with pytest.raises(UserError, match="above 100,000,000 pixels"):
        pictures.size(tmp_path / "bomb.tif")


def test_a_png_bomb_is_refused_as_one(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="above 100,000,000 pixels"):
        pictures.size(tmp_path / "bomb.png")


def test_a_truncated_picture_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(UserError, match=r"a\.png"):
        pictures.read(path)


def test_a_folder_is_searched_to_the_bottom_in_order(tmp_path):
    names = ["b.png", "a/z.TIF", "a/b/c.jpeg", "a b, \u00e4.png"]
    for name in [*names, "notes.txt", "._b.png", ".hidden/c.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert pictures.find(tmp_path) == sorted(tmp_path / name for name in names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        pictures.find(tmp_path / "empty")


@pytest.mark.parametrize("length", [96, 97, 128, 150, 2000])
@pytest.mark.parametrize("stride", [7, 16, 32])
def test_squares_cover_every_pixel_and_stay_inside(length, stride):
    found = pictures.positions(length, stride)
    assert found == sorted(set(found)) and found[0] == 0 and found[-1] == length - 32
    covered = np.zeros(length, int)
    for start in found:
        covered[start : start + 32] += 1
    assert covered.min() >= 1
    if stride == 32:
        assert (covered[: found[-1]] == 1).all()


def test_tiles_are_windows_around_their_squares():
    """Against a picture in which every pixel says where it lies, and a mirror made by hand."""
    y, x = np.mgrid[:130, :100]
    pixels = np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)

    def mirrored(index, length):
        index = abs(index)
        return index if index < length else 2 * (length - 1) - index

    for tile in pictures.tiles(pixels, 32):
        for row, column in [(0, 0), (32, 32), (63, 63), (95, 95), (0, 95), (50, 7)]:
            expected = mirrored(tile.y + row - 32, 130), mirrored(tile.x + column - 32, 100)
            assert tuple(tile.pixels[row, column, :2]) == expected
        assert tile.pixels.shape == (96, 96, 3)
