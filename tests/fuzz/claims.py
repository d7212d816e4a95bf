"""Small files that claim to be huge: they declare more than they hold, or hold packed zeros."""

import functools
import gzip
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tifffile
from PIL.PngImagePlugin import putchunk

_BLOCK = 1 << 20  # bytes of zeros, which are packed once and repeated


@functools.cache
def _packed_block() -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(bytes(_BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)


@functools.cache
def deflated_zeros(mib: int) -> bytes:
    """Returns a raw deflate stream of `mib` MiB of zeros, which is a thousandth as long."""
    return _packed_block() * mib + zlib.compressobj(9, wbits=-15).flush()


@functools.cache
def _crc_of_zeros(mib: int) -> int:
    crc, block = 0, bytes(_BLOCK)
    for _ in range(mib):
        crc = zlib.crc32(block, crc)
    return crc


def write_zip(file: Path, members: dict[str, tuple[bytes, int | None]]) -> None:
    """Writes a zip by hand, because zipfile would pack again what is packed already.

    Args:
        members: {name: (content, None)}, or for packed zeros {name: (packed, MiB of zeros)}.
    """
    body, index = b"", b""
    for name, (content, mib) in members.items():
        crc = zlib.crc32(content) if mib is None else _crc_of_zeros(mib)
        size = len(content) if mib is None else mib << 20
        method = 0 if mib is None else 8
        head = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, crc, len(content), size,
                           len(name), 0)  # fmt: skip
        place = len(body)
        body += b"PK\x03\x04" + head + name.encode() + content
        index += b"PK\x01\x02" + struct.pack("<H", 20) + head
        index += struct.pack("<HHHII", 0, 0, 0, 0, place) + name.encode()
    count = len(members)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(index), len(body), 0)
    file.write_bytes(body + index + b"PK\x05\x06" + end)


def npy_header(shape: tuple[int, ...], descr: str) -> bytes:
    """Returns the head of a .npy that declares an array."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npz(folder: Path, rng: random.Random) -> None:
    """Writes patches.npz, in which one of the members claims too much."""
    many = rng.choice([10**12, 10**7, 200_000])
    good = npy_header((3, 96, 96, 3), "|u1") + bytes(3 * 27648)
    mib = rng.choice([1500, 3000])
    packed = deflated_zeros(mib), mib
    members = rng.choice(
        [
            {"images.npy": (npy_header((many, 96, 96, 3), "|u1"), None)},
            {"images.npy": (npy_header((many, 96, 96, 3), "|u1") + bytes(27648), None)},
            {"images.npy": packed},
            {"images.npy": (good, None), "ids.npy": packed},
            {"images.npy": (good, None), "ids": packed},
            {"images.npy": (good, None), "ids.npy": (npy_header((3,), "<U1000000000"), None)},
            {"images.npy": (good, None), "ids.npy": (npy_header((3, many), "<U9"), None)},
            {
                "images.npy": (npy_header((600_000, 96, 96, 3), "|u1"), None),
                "ids.npy": (npy_header((600_000,), "<U1000"), None),
            },
        ]
    )
    write_zip(folder / "patches.npz", members)


def hdf5(folder: Path, rng: random.Random) -> None:
    """Writes patches.h5, whose data set is one packed chunk, or has a huge type or shape."""
    with h5py.File(folder / "patches.h5", "w") as file:
        kind = rng.choice(["chunk", "type", "array", "nothing"])
        if kind == "chunk":
            rows = rng.choice([40_000, 155_000])
            shape = (rows, 96, 96, 3)
            x = file.create_dataset("x", shape, np.uint8, chunks=shape, compression="gzip")
            mib = -(-rows * 27648 >> 20)
            x.id.write_direct_chunk((0, 0, 0, 0), b"\x78\x9c" + deflated_zeros(mib) + bytes(4))
        elif kind == "type":
            file.create_dataset("x", (3,), "S1000000000")
        elif kind == "array":
            file.create_dataset("x", (3,), np.dtype(("u1", (500_000_000,))))
        else:
            file.create_dataset("x", (10**9, 96, 96, 3), np.uint8, chunks=(1, 96, 96, 3))


def hdf5_gz(folder: Path, rng: random.Random) -> None:
    """Writes patches.h5.gz, with zeros after the head of an HDF5 file."""
    hdf5(folder, random.Random("nothing"))
    head = gzip.compress((folder / "patches.h5").read_bytes())
    (folder / "patches.h5").unlink()
    mib = rng.choice([1500, 3000])
    end = struct.pack("<II", _crc_of_zeros(mib), mib << 20)
    zeros = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + deflated_zeros(mib) + end
    (folder / "patches.h5.gz").write_bytes(head + zeros)


def picture(folder: Path, rng: random.Random) -> None:
    """Writes a PNG or TIFF whose header, or one of its tags, declares too much."""
    side = rng.choice([9_999, 30_000, 100_000])
    if rng.random() < 0.5:
        with (folder / "a.png").open("wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            kind = rng.choice([0, 2, 3, 6])
            size = struct.pack(">II", rng.choice([side, 96]), side)
            putchunk(file, b"IHDR", size + bytes([8, kind, 0, 0, 0]))
            text = rng.choice([b"iCCP", b"zTXt", b"IDAT"])
            name = b"" if text == b"IDAT" else b"a\0\0"
            putchunk(file, text, name + b"\x78\x9c" + deflated_zeros(1500) + bytes(4))
            putchunk(file, b"IEND", b"")
        return
    tile = zlib.compress(bytes(16))
    layout = rng.choice([{"tile": (side // 16 * 16,) * 2}, {"rowsperstrip": side}, {}])
    samples = rng.choice([3, 3000])
    options = {"photometric": "rgb" if samples == 3 else "minisblack", "planarconfig": "contig"}
    with tifffile.TiffWriter(folder / "a.tif", bigtiff=True) as tif:
        if "tile" in layout:
            tif.write(iter([tile]), shape=(96, 96, samples), dtype=np.uint8, compression="zlib",
                      **layout, **options)  # fmt: skip
        else:
            pixels = np.zeros((rng.choice([96, 1000]), 96, samples), np.uint8)
            tif.write(pixels, compression="zlib", **layout, **options)


def pth(folder: Path, rng: random.Random) -> None:
    """Writes weights.pth with a tensor that is expanded, or whose storage is packed."""
    import torch

    name = rng.choice(["bn1.weight", "conv_stem.weight", "bn1.num_batches_tracked"])
    dtype = rng.choice([torch.float16, torch.float32, torch.int8, torch.float64])
    one = torch.zeros(1, dtype=dtype)
    many = rng.choice([(40_000, 40_000), (10**12,), (1, 1, 1, 10**10)])
    torch.save({name: one.expand(*many)}, folder / "weights.pth")
    if rng.random() < 0.5:
        _with_packed_storage(folder / "weights.pth", dtype)


def _with_packed_storage(file: Path, dtype: Any) -> None:
    """Writes a tensor of zeros whose storage is packed, which torch itself never does."""
    import torch

    mib, saved_elements = 3000, 123_457
    claimed_elements = min((mib << 20) // dtype.itemsize, 2**31 - 1)
    torch.save({"bn1.weight": torch.zeros(saved_elements, dtype=dtype)}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: (archive.read(name), None) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    # Pickle writes an integer like this. Replace both the storage's size and the tensor's shape.
    saved, claimed = (b"J" + struct.pack("<i", n) for n in (saved_elements, claimed_elements))
    members[pickled] = members[pickled][0].replace(saved, claimed), None
    (storage,) = (name for name in members if name.endswith("data/0"))
    write_zip(file, members | {storage: (deflated_zeros(mib), mib)})
