"""Checks which files are slides, and what a folder's slides are called."""

import logging
import shutil
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from bef_jax.data import pictures
from bef_jax.slides import reader
from bef_jax.slides.reader import find_slides, is_slide
from tests.slides.slide_files import tissue_pixels, write_flat, write_pyramid

SIDE, MPP = 96, 0.972
LARGE, PATCH = tissue_pixels(300, 200), tissue_pixels(SIDE, SIDE)


def save(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def stack(path):
    """Writes several images of one size, which are no pyramid."""
    tifffile.imwrite(path, np.stack([LARGE] * 3), photometric="rgb", tile=(64, 64), metadata=None)
    return path


# How a file is made, and whether it is a slide without and with slides.mpp.
CASES = {
    "pyramid": (lambda path: write_pyramid(path, LARGE, None, (1, 2), 64), True, True),
    "odd pyramid": (lambda path: write_pyramid(path, LARGE, None, (1, 3.7), 64), True, True),
    "scanner": (lambda p: write_pyramid(p, LARGE, MPP, (1,), 64, aperio=True), True, True),
    "flat": (lambda path: write_flat(path, LARGE), False, True),
    "flat at the network's scale": (lambda path: write_flat(path, LARGE, 1.0), False, True),
    "flat at another scale": (lambda path: write_flat(path, LARGE, 0.25), True, True),
    "tiled at another scale": (lambda p: write_pyramid(p, LARGE, 0.25, (1,), 64), True, True),
    "72 dots per inch": (lambda path: write_flat(path, LARGE, 25_400 / 72), False, True),
    "patch": (lambda path: write_flat(path, PATCH), False, False),
    "patch at another scale": (lambda path: write_flat(path, PATCH, 0.25), False, False),
    "stack": (stack, False, True),
    "damaged": (lambda path: path.write_bytes(b"II*\0" + bytes(100)), False, False),
    "empty": (lambda path: path.write_bytes(b""), False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tiff_is_a_slide_by_its_content(name, tmp_path):
    make, expected, with_scale = CASES[name]
    path = tmp_path / "a.tif"
    make(path)
    assert is_slide(path, SIDE, MPP) is expected
    assert is_slide(path, SIDE, MPP, 0.25) is with_scale


@pytest.mark.parametrize("name", CASES)
def test_what_is_a_slide_does_not_depend_on_openslide(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    test_a_tiff_is_a_slide_by_its_content(name, tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_other_pictures_are_slides_above_the_limit_of_pictures(suffix, tmp_path, monkeypatch):
    path = save(tmp_path / f"a.{suffix}", LARGE)
    assert not is_slide(path, SIDE, MPP, 0.25)
    monkeypatch.setattr(pictures, "LIMIT", 300 * 200 - 1)
    assert is_slide(path, SIDE, MPP)
    assert is_slide(write_flat(tmp_path / "a.tif", LARGE), SIDE, MPP)


def test_without_a_scale_of_the_network_a_flat_tiff_is_a_picture(tmp_path):
    assert not is_slide(write_flat(tmp_path / "a.tif", LARGE, 0.25), SIDE, None)


def test_slides_of_a_folder_have_names_without_suffix(tmp_path):
    (tmp_path / "case1").mkdir()
    (tmp_path / ".hidden").mkdir()
    first = write_pyramid(tmp_path / "b.tif", LARGE, 0.25, (1, 2), 64)
    for name in ("case1/a.svs", "case1/a.x.TIFF", ".hidden/a.svs", "._b.svs", "notes.txt"):
        shutil.copy(first, tmp_path / name)
    save(tmp_path / "patch.png", PATCH)
    write_flat(tmp_path / "patch.tif", PATCH, 0.25)
    found = find_slides(tmp_path, SIDE, MPP)
    assert found == [
        ("b", first),
        ("case1/a", tmp_path / "case1/a.svs"),
        ("case1/a.x", tmp_path / "case1/a.x.TIFF"),
    ]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.ndpi", "a.svs", "b.svs"], ["a.ndpi", "a.svs", "b"]),
        (["a.ndpi", "a.svs", "a.svs.svs"], ["a.ndpi", "a.svs", "a.svs.svs"]),
        (["a.svs", "a/b.svs"], ["a.svs", "a/b"]),
        (["a/b.svs", "a/b/c/d.svs", "c/b.svs"], ["a/b.svs", "a/b/c/d", "c/b"]),
    ],
)
def test_names_keep_their_suffix_where_they_would_clash(files, names, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_bytes(b"")
    found = find_slides(tmp_path, SIDE)
    assert sorted(name for name, _ in found) == sorted(names)
    assert all(name in (path.name, path.stem) or "/" in name for name, path in found)


@pytest.mark.parametrize(
    ("file", "name"), [("a.svs", "a"), ("x.data", "x"), ("x", "x"), ("...svs", "...svs")]
)
def test_a_named_file_is_taken_whatever_its_suffix(file, name, tmp_path):
    path = write_pyramid(tmp_path / file, LARGE, 0.25, (1, 2), 64)
    assert find_slides(path, SIDE, MPP) == [(name, path)]
    assert find_slides(save(tmp_path / "a.png", PATCH), SIDE, MPP) == []


def test_a_dicom_slide_of_several_files_counts_once(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    series = {"1.dcm": "A", "2.DCM": "B", "3.dcm": "A", "4.dcm": None, "5.dcm": None}
    for name in series:
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(reader.with_openslide, "series_of", lambda path: series[path.name])
    assert [name for name, _ in find_slides(tmp_path, SIDE)] == ["1", "2", "4", "5"]
    assert "3.dcm: is of the same slide as 1.dcm" in caplog.text
