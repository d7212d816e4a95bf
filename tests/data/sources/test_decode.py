"""Listed pictures, compared with the pixels that Pillow wrote, and with closed forms."""

import io
import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from bef_jax.data.sources import decode
from bef_jax.errors import UserError
from tests.data.sources.conftest import expect_error

SIDE = 32


def noise(height=SIDE, width=SIDE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG", mpp=None):
    """Returns the bytes of a picture; `mpp` is written as TIFF's pixels per centimetre."""
    options = {"resolution": 10_000 / mpp, "resolution_unit": "cm"} if mpp else {}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tiff(mpp=None, side=SIDE, seed=0):
    return encoded(noise(side, side, seed), "TIFF", mpp)


def rows_of(contents):
    """Returns a row for each picture, named 0, 1 and so on."""
    return [decode.Listed(f"{i}.x", 0, str(i), content=x) for i, x in enumerate(contents)]


@pytest.fixture
def make(make_data):
    """Returns make(**fields): config.data with patches of 32."""
    return lambda **fields: make_data("image_folder", "x", **{"patch_size": SIDE, **fields})


def opened(data, contents):
    return decode.open_listed(data, {"train": rows_of(contents)}, ("a", "b"))


def patches(data, contents):
    """Returns the patches that pictures become, uint8 [N, S, S, 3]."""
    return np.concatenate([chunk.images for _, chunk in opened(data, contents).chunks])


def expect_refusal(data, contents, *messages):
    expect_error(data, *messages, read=lambda data: opened(data, contents).chunks)


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes chunks of 8, and blocks of 2."""
    monkeypatch.setattr(decode, "CHUNK_SIZE", 8)
    monkeypatch.setattr(decode, "_BLOCK", 2)


# --- chunks


def test_files_and_bytes_become_chunks_in_their_order(make, tmp_path):
    images = [noise(seed=i) for i in range(1030)]
    rows = []
    for i, image in enumerate(images):
        path, content = tmp_path / f"{i}.png", encoded(image)
        if i % 2:
            path.write_bytes(content)
            content = None
        rows.append(decode.Listed(str(path), i % 300, f"id{i}", f"g{i // 7}", content))
    splits = {"train": rows[5:], "test": rows[:5]}
    classes = tuple(map(str, range(300)))
    contents = decode.open_listed(make(), splits, classes)
    found = list(contents.chunks)
    assert [(split, len(chunk.ids)) for split, chunk in found] == [
        ("test", 5),
        ("train", 512),
        ("train", 512),
        ("train", 1),
    ]
    assert contents.classes == classes
    joined = [np.concatenate(parts) for parts in zip(*(chunk for _, chunk in found), strict=True)]
    np.testing.assert_array_equal(joined[0], images)
    np.testing.assert_array_equal(joined[1], np.arange(1030) % 300)
    assert joined[1].dtype == np.uint16
    assert joined[2].tolist() == [row.id for row in rows]
    assert joined[3].tolist() == [row.group for row in rows]


def test_splits_come_in_the_order_of_reading_and_progress_is_reported(make):
    rows, calls = rows_of([encoded(noise(seed=i)) for i in range(9)]), []

    def begin(name, total, unit):
        calls.append((name, total, unit))
        return calls.append

    splits = {"train": rows[:3], "valid": rows[4:]}
    contents = decode.open_listed(make(), splits, ("a", "b"), begin)
    [(_, valid), (_, train)] = contents.chunks
    assert valid.ids.tolist() == list("45678") and train.ids.tolist() == list("012")
    assert train.groups is None
    assert calls == [("reading valid", 5, "patches"), 5, ("reading train", 3, "patches"), 3]


@pytest.mark.parametrize("padding", [0, 2 * SIDE * SIDE * 3])
def test_chunks_of_large_patches_or_large_files_hold_fewer(padding, make, monkeypatch):
    monkeypatch.setattr(decode, "_CHUNK_BYTES", 10 * SIDE * SIDE * 3)
    chunks = opened(make(), [encoded(noise()) + bytes(padding)] * 25).chunks
    sizes = [len(chunk.labels) for _, chunk in chunks]
    assert sizes == ([4] * 6 + [1] if padding else [10, 10, 5])


# --- threads


def test_an_error_comes_at_its_place(make, small_chunks):
    contents = [encoded(noise(seed=i)) for i in range(40)]
    contents[30] = contents[21] = b"no picture"
    chunks = opened(make(), contents).chunks
    assert [next(chunks)[1].ids[0] for _ in range(2)] == ["0", "8"]
    with pytest.raises(UserError, match=r"21\.x: cannot be read as a picture"):
        next(chunks)
    assert not decoding_threads()


def decoding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_nothing_stays_behind_a_reader_that_stops(make, small_chunks, tmp_path):
    (tmp_path / "0.png").write_bytes(encoded(noise()))
    rows = [decode.Listed(str(tmp_path / "0.png"), 0, str(i)) for i in range(100)]
    files = os.listdir("/proc/self/fd")
    chunks = decode.open_listed(make(), {"train": rows}, ("a", "b")).chunks
    next(chunks)
    assert decoding_threads()
    del chunks
    assert not decoding_threads()
    assert os.listdir("/proc/self/fd") == files


def test_ctrl_c_ends_the_threads(make, monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK", 2)
    chunks = opened(make(), [encoded(noise())] * 200).chunks
    calls = itertools.count()

    def interrupt(*_):
        if next(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.005)
        return noise()

    monkeypatch.setattr(decode.pictures, "read", interrupt)
    # A shell starts background jobs with Ctrl-C switched off, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
    finally:
        signal.signal(signal.SIGINT, before)
    for thread in decoding_threads():
        thread.join(10)
    assert not decoding_threads()
    assert next(calls) < 200


def test_few_rows_are_taken_before_they_are_needed(make, small_chunks):
    taken = itertools.count()
    row = rows_of([encoded(noise())])[0]
    rows = (row for _ in iter(lambda: next(taken), 1000))
    form = decode.form_of(make(), row)
    chunks = decode.read_listed("train", rows, 1000, form, 2)
    for _ in range(5):
        next(chunks)
    chunks.close()
    assert next(taken) <= 7 * 8 + 1


# --- size


def test_another_size_is_an_error_that_names_the_fields(make):
    fields = "config.data.patch_size is 32; set it to 48, or set config.data.resize"
    expect_refusal(make(), [encoded(noise(48, 48))], f"0.x: 48x48 pixels, but {fields}")
    wide = "0.x: 48x32 pixels, but config.data.patch_size is 32; cut them to 32x32, or set"
    expect_refusal(make(), [encoded(noise(32, 48))], wide)
    mixed = [encoded(noise()), encoded(noise(32, 48))]
    message = "1.x: 48x32 pixels, unlike 0.x, which has the 32x32 of config.data.patch_size"
    expect_refusal(make(), mixed, message, "config.data.resize")
    expect_refusal(make(resize="side"), mixed, "1.x: 48x32 pixels; config.data.resize=side needs")


def test_a_large_picture_is_refused_by_its_header(make, monkeypatch):
    monkeypatch.setattr(decode, "_LIMIT", 64 * 64)
    data = make(resize="side")
    patches(data, [encoded(noise(64, 64))])
    expect_refusal(data, [encoded(noise(65, 65))], "0.x: 65x65 pixels are above 4,096; cut it")


def ramp(side):
    """Returns a picture in which each pixel holds its row and column."""
    y, x = np.mgrid[:side, :side]
    return np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("side", [32, 40, 100, 256, 20])
def test_a_resized_picture_keeps_the_place_of_what_it_shows(side, make):
    [found] = patches(make(resize="side"), [encoded(ramp(side))])
    expected = (np.arange(SIDE) + 0.5) * side / SIDE - 0.5
    inner = slice(2, -2)  # at its edges, the filter sees no more of the ramp
    np.testing.assert_allclose(found[inner, 5, 0], expected[inner], atol=0.6)
    np.testing.assert_allclose(found[5, inner, 1], expected[inner], atol=0.6)


def test_resizing_does_not_alias(make):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    [found] = patches(make(resize="side"), [encoded(stripes)])
    assert np.abs(found[:, 2:-2].astype(int) - 127.5).max() < 4


def test_pictures_of_the_right_size_stay_as_they_are(make):
    contents = [tiff(0.5, seed=seed) for seed in range(3)]
    for fields in ({"resize": "side"}, {"resize": "mpp", "mpp": 0.5}, {}):
        found = patches(make(**fields), contents)
        np.testing.assert_array_equal(found, [noise(seed=seed) for seed in range(3)])


def test_pictures_of_the_right_scale_are_cut_without_resampling(make):
    [found] = patches(make(resize="mpp", mpp=0.5), [tiff(0.5, 37)])
    np.testing.assert_array_equal(found, noise(37, 37)[2:34, 2:34])


# --- scale


@pytest.mark.parametrize(("mpp", "side"), [(0.5, 64), (0.5, 101), (0.25, 200), (2.0, 40)])
def test_pictures_are_brought_to_a_scale_and_cut_in_the_middle(mpp, side, make):
    contents = [encoded(ramp(side), "TIFF", mpp)]
    data = make(resize="mpp", mpp=1.0)
    [found] = patches(data, contents)
    assert opened(data, contents).mpp == 1.0
    # The middle 32 of the rows that the whole picture would become; centres of pixels are at 0.5.
    first = (round(side * mpp) - SIDE) // 2
    expected = (first + np.arange(SIDE) + 0.5) / mpp - 0.5
    inner = slice(2, -2)
    np.testing.assert_allclose(found[inner, 5, 0], expected[inner], atol=0.6)
    np.testing.assert_allclose(found[5, inner, 1], expected[inner], atol=0.6)


def test_a_picture_cannot_be_brought_to_a_scale_without_its_own_or_if_it_becomes_too_small(make):
    data = make(resize="mpp", mpp=1.0)
    small = "0.x: 31x31 pixels after resampling to 1 um per pixel, below config.data.patch_size=32"
    expect_refusal(data, [tiff(0.48, 64)], small)
    expect_refusal(data, [encoded(noise())], "0.x: does not say its um per pixel, which config")
    expect_refusal(make(resize="mpp"), [tiff(0.5)], "config.data.mpp is 0, but config.data.resize")


def test_a_picture_of_another_scale_than_the_config_or_the_first_is_refused(make):
    fine = [encoded(noise()), tiff(0.535), tiff(0.465), encoded(noise(), "JPEG")]
    assert len(patches(make(mpp=0.5), fine)) == 4
    other = "{}.x: says 0.545 um per pixel, but the set has 0.5; resample it, or set config.data"
    expect_refusal(make(mpp=0.5), [*fine, tiff(0.545)], other.format(4))
    expect_refusal(make(mpp=0.5), [tiff(0.545)], other.format(0))
    expect_refusal(make(), [tiff(0.5), *fine, tiff(0.545)], other.format(5))
    lone = "1.x: says 0.5 um per pixel, but 0.x says none; set config.data.mpp"
    expect_refusal(make(), [encoded(noise()), tiff(0.5)], lone)


@pytest.mark.parametrize(
    ("fields", "contents", "mpp"),
    [
        ({}, [tiff(0.5)], 0.5),
        ({}, [encoded(noise(), "JPEG")], None),
        ({"mpp": 0.5}, [tiff(0.52)], 0.5),
        ({"resize": "side"}, [tiff(0.5, 64), tiff(1.0)], 1.0),
    ],
)
def test_the_config_or_the_first_picture_gives_the_scale(fields, contents, mpp, make):
    data = make(**fields)
    assert opened(data, contents).mpp == (mpp and pytest.approx(mpp, rel=1e-3))
    assert len(patches(data, contents)) == len(contents)
