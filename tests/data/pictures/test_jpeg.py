"""Compares the pixels of JPEGs with Pillow's, bit for bit."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from bef_jax.data import pictures
from bef_jax.data.pictures import jpeg
from bef_jax.errors import UserError


def noise(height, width):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_plain_jpegs_have_the_pixels_of_pillow(subsampling, progressive, monkeypatch):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 20)  # Pillow's buffer for progressive ones
    smooth = np.asarray(Image.fromarray(noise(9, 9)).resize((130, 97)))
    for quality, pixels in itertools.product((10, 75, 100), (noise(97, 130), smooth)):
        content = encode(
            pixels, quality=quality, subsampling=subsampling, progressive=progressive, optimize=True
        )
        assert jpeg.plain_size(content) == (97, 130)
        expected = np.asarray(Image.open(io.BytesIO(content)))
        np.testing.assert_array_equal(jpeg.decode(content), expected)


def of_mode(mode, **options):
    file = io.BytesIO()
    Image.fromarray(noise(96, 96)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(96, 100), exif=exif)


NOT_PLAIN = {
    "grey": of_mode("L"),
    "CMYK": of_mode("CMYK"),
    "RGB inside": encode(noise(96, 96), keep_rgb=True),
    "turned": turned(),
    "PNG": b"\x89PNG",
    "empty": b"",
    "start alone": b"\xff\xd8",
    "start and end": b"\xff\xd8\xff\xd9",
    "cut": encode(noise(96, 96))[:-1],
    "12 bits": encode(noise(96, 96)).replace(b"\x00\x11\x08", b"\x00\x11\x0c", 1),
    "no frame": encode(noise(96, 96)).replace(b"\xff\xc0", b"\xff\xe5", 1),
    "two frames": encode(noise(96, 96)).replace(b"\xff\xdb\x00\x43", b"\xff\xc0\x00\x43"),
    "of height 0": encode(noise(96, 96)).replace(b"\x08\x00\x60", b"\x08\x00\x00", 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_other_jpegs_are_not_plain(kind):
    assert jpeg.plain_size(NOT_PLAIN[kind]) is None


@pytest.mark.parametrize("kind", ["grey", "CMYK", "RGB inside", "turned"])
def test_jpegs_that_are_not_plain_have_the_pixels_of_pillow(kind):
    found = pictures.read("a.jpg", content=NOT_PLAIN[kind])
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(NOT_PLAIN[kind]))).convert("RGB")
    np.testing.assert_array_equal(found, np.asarray(image))


def test_profiles_and_comments_do_not_change_a_plain_jpeg():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encode(noise(96, 96), icc_profile=profile, comment=b"from scanner 3")
    assert jpeg.plain_size(content) == (96, 96)
    np.testing.assert_array_equal(jpeg.decode(content), jpeg.decode(encode(noise(96, 96))))


@pytest.mark.parametrize("cut", [1, 2, 3, 1000])
def test_a_jpeg_that_lacks_its_end_is_refused(cut):
    content = encode(noise(96, 96))
    with pytest.raises(UserError, match="truncated"):
        pictures.read("a.jpg", content=content[:-cut])


def test_the_size_of_a_plain_jpeg_is_checked_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(jpeg, "decode", lambda content: pytest.fail("decoded"))
    content = encode(noise(96, 96)).replace(b"\x08\x00\x60\x00\x60", b"\x08\xff\xff\xff\xff", 1)
    with pytest.raises(UserError, match="65535x65535 pixels are above 100,000,000"):
        pictures.read("a.jpg", content=content)
