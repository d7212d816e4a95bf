"""Handmade .npz archives whose headers or ids are wrong, compared with expected errors.

Valid archives are in test_sources.py.
"""

import io
import zipfile

import numpy as np
import pytest

from bef_jax.data.sources import npz
from bef_jax.errors import UserError
from tests.data.sources.conftest import expect_error

IMAGE = 96 * 96 * 3


def header(shape, dtype="|u1"):
    text = io.BytesIO()
    declared = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(text, declared)
    return text.getvalue()


def array(values):
    text = io.BytesIO()
    np.save(text, values)
    return text.getvalue()


def write_zip(path, packing=zipfile.ZIP_DEFLATED, **members):
    """Writes an archive. A member is bytes, or a list of parts: bytes, or (byte, count)."""
    with zipfile.ZipFile(path, "w", packing, compresslevel=1) as archive:
        for name, parts in members.items():
            with archive.open(name.replace("_npy", ".npy"), "w", force_zip64=True) as member:
                for part in [parts] if isinstance(parts, bytes) else parts:
                    write_part(member, part)


def write_part(member, part):
    if isinstance(part, bytes):
        member.write(part)
        return
    for start in range(0, part[1], 1 << 24):
        member.write(part[0] * min(1 << 24, part[1] - start))


def images(n):
    return [header((n, 96, 96, 3)), (b"\0", n * IMAGE)]


def labels(n):
    return array(np.arange(n) % 2)


def test_an_archive_that_does_not_hold_what_it_declares_is_refused(tmp_path, printed_by):
    paths = [tmp_path / f"{name}.npz" for name in ("none", "short", "long", "header", "ids")]
    # These ids are never read, because the images beside them are refused first.
    ids = [header((600_000,), "<U1000"), (b"\0", 10**6)]
    write_zip(paths[0], images_npy=header((10**12, 96, 96, 3)))
    write_zip(paths[1], images_npy=[header((600_000, 96, 96, 3)), (b"\0", 10**6)], ids_npy=ids)
    write_zip(paths[2], images_npy=[*images(2), b"more"])
    write_zip(paths[3], images_npy=[b"\x93NUMPY\2\0\0\0\0\x50", (b" ", 5 << 28)])
    write_zip(paths[4], images_npy=images(10), ids_npy=[header((10,), "<U4000"), (b"\0", 160_000)])
    lines = printed_by(*[f"next(npz.stream(Path({str(path)!r})))" for path in paths])
    for path, line in zip(paths[:3], lines[:3], strict=True):
        assert line.startswith(f"{path} (images): declares uint8 [") and "does not hold" in line
    assert "header.npz: cannot be read (a header of 1342177280 bytes is too long)" in lines[3]
    assert "ids.npz (ids): ids are <U4000 [10] for 10 images" in lines[4]


def test_a_member_list_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path):
    # The list of members at the end of an archive also has sizes. This one is changed by hand.
    path = tmp_path / "a.npz"
    write_zip(path, zipfile.ZIP_STORED, images_npy=header((10**6, 96, 96, 3)))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2")
    size = 10**6 * IMAGE + 128
    content[at + 20 : at + 28] = 2 * (2**32 - 1).to_bytes(4, "little")
    extra = b"\1\0\20\0" + 2 * size.to_bytes(8, "little")
    content[at + 30 : at + 32] = len(extra).to_bytes(2, "little")
    name_end = at + 46 + len("images.npy")
    old_length = int.from_bytes(path.read_bytes()[at + 30 : at + 32], "little")
    content[name_end : name_end + old_length] = extra
    end = content.rindex(b"PK\5\6")
    content[end + 12 : end + 16] = (end - at).to_bytes(4, "little")
    path.write_bytes(content)
    assert zipfile.ZipFile(path).infolist()[0].file_size == size
    # Newer versions of zipfile find this themselves.
    with pytest.raises(UserError, match=r"declares uint8|Overlapped entries"):
        next(npz.stream(path))


def test_a_member_without_the_suffix_npy_is_not_read(tmp_path, printed_by):
    # np.load prefers a member `labels` to `labels.npy`, so a check of the latter would not help.
    wrong = {"train": [header((5 << 28,)), (b"\0", 5 << 28)], "valid": array(np.ones(4))}
    for split, parts in wrong.items():
        arrays = {"labels": parts, "labels_npy": labels(4)}
        write_zip(tmp_path / f"{split}.npz", images_npy=images(4), **arrays)
    read = f"npz.read(data_of('npz', {str(tmp_path)!r}))"
    (line,) = printed_by(f"[chunk.labels.tolist() for _, chunk in {read}]")
    assert line == "read: [[0, 1, 0, 1], [0, 1, 0, 1]]"


def test_bzip2_and_lzma_are_refused(tmp_path):
    for packing in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_zip(tmp_path / "a.npz", packing, images_npy=images(2))
        with pytest.raises(UserError, match=r"packed in a way that np\.savez does not use"):
            next(npz.stream(tmp_path / "a.npz"))


def test_millions_of_members_are_refused(tmp_path, printed_by):
    path = tmp_path / "a.npz"
    write_zip(path, images_npy=images(2))
    content = path.read_bytes()
    at, end = content.rindex(b"PK\1\2"), content.rindex(b"PK\5\6")
    # A list of 2.3 million members is 138 MB, and 1.2 GB once it is parsed.
    entry = content[at:end]
    size = 2_300_000 * len(entry)
    numbers = [(2_300_000).to_bytes(8, "little")] * 2
    numbers += [size.to_bytes(8, "little"), at.to_bytes(8, "little")]
    record = b"PK\6\6" + (44).to_bytes(8, "little") + bytes(12) + b"".join(numbers)
    locator = b"PK\6\7" + bytes(4) + (at + size).to_bytes(8, "little") + b"\1\0\0\0"
    with open(path, "wb") as file:
        file.write(content[:at])
        for _ in range(23):
            file.write(entry * 100_000)
        file.write(record + locator + content[end:])
    (line,) = printed_by(f"next(npz.stream(Path({str(path)!r})))")
    assert "a.npz: cannot be read (its list of members is too long)" in line


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_a_special_file_is_refused(kind, tmp_path, patches, special, printed_by, write):
    folder = write("npz", tmp_path / "raw", patches)
    special(kind, folder / "train.npz")
    special(kind, folder / "only.npz")
    lines = printed_by(
        f"list(npz.read(data_of('npz', {str(folder)!r})))",
        f"next(npz.stream(Path({str(folder / 'only.npz')!r})))",
    )
    for name, line in zip(("train", "only"), lines, strict=True):
        assert line == f"{folder / name}.npz: is {kind}; name a regular file"
    # The test split may be absent, but a special file in its place is an error.
    special(kind, folder / "test.npz")
    (line,) = printed_by(f"list(npz.read(data_of('npz', {str(folder)!r})))")
    assert f"test.npz: is {kind}" in line


BAD_IDS = {
    "surrogate": (np.array(["a", "b\ud800"]), "row 1 is not text"),
    "not a character": (np.array([7, 2**31], "<u4").view("<U1"), "row 1 is not text"),
    "bytes": (np.array([b"a", b"\xff"]), "cannot be read ('utf-8' codec"),
    "repeated": (np.array(["a", "a"]), "a names 2 patches"),
    "objects": (np.array(["a", None]), "object [2] for 2 images"),
}


@pytest.mark.parametrize("mistake", BAD_IDS)
def test_ids_that_are_not_text_or_repeat_are_refused(mistake, tmp_path):
    ids, message = BAD_IDS[mistake]
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 96, 96, 3), np.uint8), ids=ids)
    expect_error(tmp_path / "a.npz", message, read=npz.stream)


@pytest.mark.parametrize("dtype", [">U3", "<U3", "S3", "i8", ">i2"])
def test_ids_of_other_dtypes_are_text(dtype, tmp_path):
    ids = np.array([12, 7]).astype(dtype)
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 96, 96, 3), np.uint8), ids=ids)
    ((found, _),) = npz.stream(tmp_path / "a.npz")
    assert found.tolist() == ["12", "7"]
