"""HDF5 files that name other files, or that unpack to gigabytes, compared with expected errors.

Valid files are in test_sources.py.
"""

import gzip
import os
import zlib

import h5py
import numpy as np
import pytest

from bef_jax.data.sources import hdf5, pcam_hdf5
from bef_jax.errors import UserError
from tests.data.sources.conftest import expect_error

GZIP = {"compression": "gzip", "compression_opts": 1}
PATCH = (96, 96, 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.h5"


def create(path, shape=(4, *PATCH), dtype="u1", name="x", **options):
    with h5py.File(path, "w") as file:
        return file.create_dataset(name, shape, dtype, **options).shape


def expect_stream_error(path, message):
    expect_error(path, f"{path}: ", message, read=hdf5.stream)


# --- files that name other files, which are not opened


def link_to_other_file(path, other):
    with h5py.File(path, "w") as file:
        file["x"] = h5py.ExternalLink(str(other), "/x")


def link_through_soft_link(path, other):
    with h5py.File(path, "w") as file:
        file["y"] = h5py.ExternalLink(str(other), "/x")
        file["x"] = h5py.SoftLink("/y")


def store_outside(path, other):
    create(path, external=[(str(other), 0, 4 * 27648)])


def map_to_other_file(path, other):
    layout = h5py.VirtualLayout((4, *PATCH), "u1", maxshape=(None, *PATCH))
    source = h5py.VirtualSource(str(other), "x", (4, *PATCH), maxshape=(None, *PATCH))
    unlimited = h5py.h5s.UNLIMITED
    layout[0:unlimited] = source[0:unlimited]
    with h5py.File(path, "w", libver="latest") as file:
        file.create_virtual_dataset("x", layout)


NAMING_OTHER_FILES = {
    link_to_other_file: "has no data",
    link_through_soft_link: "has no data",
    store_outside: "lies in other files",
    map_to_other_file: "lies in other files",
}


def test_other_files_that_a_file_names_are_not_opened(tmp_path, printed_by):
    os.mkfifo(tmp_path / "fifo")
    lines = []
    for number, make in enumerate(NAMING_OTHER_FILES):
        make(file := tmp_path / f"{number}.h5", tmp_path / "fifo")
        lines.append(f"list(hdf5.stream(Path({str(file)!r})))")
    for line, message in zip(printed_by(*lines), NAMING_OTHER_FILES.values(), strict=True):
        assert message in line


@pytest.mark.parametrize("suffix", [".h5", ".h5.gz"])
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_a_special_file_is_refused(kind, suffix, tmp_path, patches, special, printed_by, write):
    folder = write("pcam_hdf5_gz" if suffix == ".h5.gz" else "pcam_hdf5", tmp_path, patches)
    file = folder / f"camelyonpatch_level_2_split_test_x{suffix}"
    special(kind, file)
    printed = printed_by(
        f"list(pcam_hdf5.read(data_of('pcam_hdf5', {str(folder)!r})))",
        f"list(hdf5.stream(Path({str(file)!r})))",
    )
    assert printed == [f"{file}: is {kind}; name a regular file"] * 2


# --- small files that unpack to gigabytes, or declare gigabytes


@pytest.mark.parametrize("rows", [155_000, 40_000, 2500])
def test_a_chunk_that_is_too_large_is_refused(rows, path):
    create(path, (rows, *PATCH), chunks=(rows, *PATCH), fillvalue=0, **GZIP)
    with h5py.File(path, "r+") as file:
        file["x"].id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(1000)))
    expect_stream_error(path, "too large to be read; repack it: h5repack")


def test_small_chunks_are_refused_if_their_rows_together_are_gigabytes(path):
    # A chunk holds a column of pixels of all patches, so it is small. Each patch is in 288 chunks.
    create(path, (60_000, *PATCH), chunks=(60_000, 96, 1, 1), **GZIP)
    expect_stream_error(path, "too large to be read; repack it: h5repack")


def test_a_chunk_that_unpacks_to_more_than_it_declares_is_refused(path, printed_by):
    create(path, (1, *PATCH), chunks=(1, *PATCH), **GZIP)
    packer = zlib.compressobj(1)
    stream = b"".join(packer.compress(bytes(1 << 24)) for _ in range(80)) + packer.flush()
    with h5py.File(path, "r+") as file:
        file["x"].id.write_direct_chunk((0, 0, 0, 0), stream)
    (line,) = printed_by(f"list(hdf5.stream(Path({str(path)!r})))")
    assert "the chunk at (0, 0, 0, 0) may be too large to be read; repack it" in line


@pytest.mark.parametrize("packing", [GZIP, {"compression": "lzf"}, {}], ids=["gzip", "lzf", "none"])
def test_large_valid_chunks_are_read(packing, path):
    images = np.random.default_rng(0).integers(0, 256, (40, *PATCH), dtype=np.uint8)
    images[:20] >>= 4  # so that this half shrinks when it is packed
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", data=images, chunks=(20, *PATCH), **packing)
        if packing:  # a filter may leave a chunk unpacked, as this one
            x.id.write_direct_chunk((20, 0, 0, 0), images[20:].tobytes(), filter_mask=1)
    ((ids, found),) = hdf5.stream(path)
    np.testing.assert_array_equal(found, images)
    assert ids.tolist() == [f"a_{row}" for row in range(40)]


@pytest.mark.parametrize("chunks", [(100, *PATCH), (700, 48, 96, 3), (700, 5, 7, 2), None])
def test_each_chunk_is_unpacked_once(chunks, path, monkeypatch):
    images = np.zeros((1500, *PATCH), np.uint8)
    images[:, 0, 0] = np.arange(1500)[:, None] % 251
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=images, chunks=chunks, **(GZIP if chunks else {}))
    starts, read_direct = [], h5py.Dataset.read_direct
    decode, packed_chunks = hdf5.imagecodecs.deflate_decode, []

    def read_and_note_start(self, band, rows):
        starts.append(rows.start)
        read_direct(self, band, rows)

    def decode_and_note(packed, out):
        packed_chunks.append(bytes(packed))
        return decode(packed, out=out)

    monkeypatch.setattr(h5py.Dataset, "read_direct", read_and_note_start)
    monkeypatch.setattr(hdf5.imagecodecs, "deflate_decode", decode_and_note)
    parts = list(hdf5.stream(path))
    assert max(len(ids) for ids, _ in parts) <= 512
    np.testing.assert_array_equal(np.concatenate([found for _, found in parts]), images)
    # Each read begins where a chunk begins, so no chunk is part of two reads.
    assert all(start % (chunks[0] if chunks else 1) == 0 for start in starts)
    assert len(starts) == len(set(starts)) <= 3
    # Chunks of whole rows that gzip packed are unpacked here, and each of them is different.
    assert len(packed_chunks) == len(set(packed_chunks)) == (15 if chunks == (100, *PATCH) else 0)
    assert bool(starts) == (not packed_chunks)


@pytest.mark.parametrize(("rows", "limit"), [(150, 40), (128, None), (1, None), (700, 650)])
def test_unpacked_chunks_are_what_hdf5_reads(rows, limit, path):
    images = np.random.default_rng(0).integers(0, 9, (rows, *PATCH), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=images, chunks=(min(64, rows), *PATCH), **GZIP)
    with h5py.File(path) as file:
        assert hdf5._has_deflated_rows(file["x"])
        found = [block for _, block in hdf5._blocks(file["x"], limit or rows)]
        np.testing.assert_array_equal(np.concatenate(found), file["x"][:limit])


@pytest.mark.parametrize("mask", [0, 2])  # 2 leaves out a filter that is not there
@pytest.mark.parametrize("size", [1, 27_647, 27_649, 100_000])
def test_a_chunk_that_unpacks_to_another_size_is_refused(size, mask, path):
    create(path, (1, *PATCH), chunks=(1, *PATCH), **GZIP)
    packed = zlib.compress(bytes(size))
    with h5py.File(path, "r+") as file:
        file["x"].id.write_direct_chunk((0, 0, 0, 0), packed, filter_mask=mask)
    expect_stream_error(path, "cannot be read")


@pytest.mark.parametrize("chunks", [(1, *PATCH), None])
def test_rows_that_are_declared_but_missing_are_refused(chunks, path):
    create(path, (10**9, *PATCH), chunks=chunks)
    expect_stream_error(path, "declares")


def test_filters_other_than_one_of_gzip_and_lzf_are_refused(path):
    create(path, chunks=(1, *PATCH), scaleoffset=0)
    expect_stream_error(
        path, "packed by the filters [6]; only one of gzip and LZF is read; repack it"
    )
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((1, *PATCH))
        plist.set_deflate(1)
        plist.set_deflate(1)
        space = h5py.h5s.create_simple((4, *PATCH))
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_UINT8, space, plist)
    expect_stream_error(
        path, "packed by the filters [1, 1]; only one of gzip and LZF is read; repack it"
    )


NOT_LABELS = {
    "text of a gigabyte": ("S1000000000", (20, 1, 1, 1)),
    "arrays": (("u1", (500_000_000,)), (20, 1, 1, 1)),
    "objects": (h5py.string_dtype(), (20, 1, 1, 1)),
    "references": (h5py.ref_dtype, (20, 1, 1, 1)),
    "compound": ([("a", "u1"), ("b", "f8")], (20, 1, 1, 1)),
    "nothing": (None, None),
    "one number": ("u1", ()),
}


@pytest.mark.parametrize("kind", NOT_LABELS)
def test_data_that_cannot_be_labels_are_refused(kind, tmp_path, patches, write, make_data):
    dtype, shape = NOT_LABELS[kind]
    folder = write("pcam_hdf5", tmp_path, patches)
    file = folder / "camelyonpatch_level_2_split_train_y.h5"
    if shape is None:
        with h5py.File(file, "w") as written:
            written["y"] = h5py.Empty("u1")
    else:
        create(file, shape, dtype, "y", **({"chunks": (1, 1, 1, 1)} if shape else {}))
    with pytest.raises(
        UserError, match=r"labels must be numbers|labels are .* for 20 images"
    ) as caught:
        list(pcam_hdf5.read(make_data("pcam_hdf5", folder)))
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < 400


# --- .gz


def test_a_gz_that_unpacks_to_much_more_than_pcam_does_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.h5.gz"
    file.write_bytes(gzip.compress(bytes(4 << 20)))
    monkeypatch.setattr(hdf5, "_UNPACKED_ALWAYS_ALLOWED", 1 << 20)
    expect_stream_error(file, "unpacks to more than 10 GB or 100 times its size")
    assert os.listdir(tmp_path) == ["a.h5.gz"]


def test_progress_of_unpacking_is_reported(tmp_path, patches, write, make_data):
    folder = write("pcam_hdf5_gz", tmp_path, patches)
    progress = {}

    def begin(name, total, unit):
        progress[name] = 0, total, unit
        return lambda n: progress.update({name: (progress[name][0] + n, total, unit)})

    list(pcam_hdf5.read(make_data("pcam_hdf5", folder), begin))
    assert progress["reading valid"] == (9, 9, "patches")
    name = "camelyonpatch_level_2_split_valid_x.h5.gz"
    size = (folder / name).stat().st_size
    assert progress["unpacking split_valid_x.h5.gz"] == (size, size, "bytes")
