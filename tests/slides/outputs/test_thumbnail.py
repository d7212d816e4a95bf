"""A slide as a small picture, compared with means of squares."""

import numpy as np
import pytest

from bef_jax.slides.outputs import thumbnail
from bef_jax.slides.outputs.thumbnail import read_thumbnail
from bef_jax.slides.reader import Level
from tests.slides.outputs.fake_slide import FakeSlide


def test_a_thumbnail_has_the_mean_of_each_square(monkeypatch):
    monkeypatch.setattr(thumbnail, "_READ", 100)  # several parts
    pixels = np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)
    found = read_thumbnail(FakeSlide(420, 300, pixels=pixels), 70)
    assert found.shape == (50, 70, 3)
    expected = pixels.reshape(50, 6, 70, 6, 3).mean(axis=(1, 3))
    assert np.abs(found - expected).max() < 1


def test_the_parts_that_are_read_leave_no_seams(monkeypatch):
    y, x = np.mgrid[:151, :233]
    pixels = np.stack([y, x, (x + y) // 2], axis=-1).astype(np.uint8)
    slide = FakeSlide(233, 151, pixels=pixels)
    whole = read_thumbnail(slide, 100)
    monkeypatch.setattr(thumbnail, "_READ", 20)
    assert np.abs(read_thumbnail(slide, 100).astype(int) - whole).max() <= 1
    assert len(slide.reads) > 50


def test_the_smallest_level_that_is_large_enough_is_read():
    slide = FakeSlide(40_000, 30_000, (1, 4, 16, 64))
    assert read_thumbnail(slide, 1000).shape == (750, 1000, 3)
    assert {level for level, _ in slide.reads} == {2}


def test_a_level_that_is_large_enough_in_one_direction_only_is_not_read():
    slide = FakeSlide(2000, 8)
    slide.levels = (*slide.levels, Level(1000, 1, (2.0, 8.0)))
    assert read_thumbnail(slide, 1000).shape == (4, 1000, 3)
    assert {level for level, _ in slide.reads} == {0}


@pytest.mark.parametrize("size", [(1, 1), (16, 9), (999, 1000)])
def test_a_small_slide_keeps_its_size(size):
    assert read_thumbnail(FakeSlide(*size), 1000).shape[1::-1] == size


@pytest.mark.parametrize("size", [(100_000, 40), (40, 100_000), (9_000, 7_000)])
def test_a_single_huge_level_is_read_in_parts(size):
    slide = FakeSlide(*size)
    found = read_thumbnail(slide, 1000)
    assert max(found.shape) == 1000 and min(found.shape[:2]) >= 1
    assert (found == 200).all()
    assert max(pixels for _, pixels in slide.reads) <= 2100**2
    assert sum(pixels for _, pixels in slide.reads) < 1.1 * size[0] * size[1]
