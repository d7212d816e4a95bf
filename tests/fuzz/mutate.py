"""Damage to files, to some bytes or to whole files, without knowledge of any format."""

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def emptied(data: bytes, rng: random.Random) -> bytes:
    return b""


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Flips some bits, most of them near the start, where headers are."""
    damaged = bytearray(data)
    reach = rng.choice([64, 512, len(data)])
    for _ in range(rng.choice([1, 1, 4, 32]) if data else 0):
        damaged[rng.randrange(min(reach, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwritten(data: bytes, rng: random.Random) -> bytes:
    start, block = rng.randrange(len(data) + 1), _block(rng)
    return data[:start] + block + data[start + len(block) :]


def inserted(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + _block(rng) + data[start:]


def repeated(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start : start + rng.randrange(1, 4096)] * 2 + data[start:]


def replaced(data: bytes, rng: random.Random) -> bytes:
    """Replaces the data with the head of another format and random bytes."""
    heads = [b"\x89HDF\r\n\x1a\n", b"PK\x03\x04", b"\x1f\x8b\x08", b"II*\x00", b"\x89PNG\r\n\x1a\n"]
    heads += [b"\x93NUMPY\x01\x00", b"{", b"[]", b"null", b"\xef\xbb\xbfid,label\r\n", b"\x80\x04."]
    return rng.choice(heads) + rng.randbytes(rng.choice([0, 8, 512]))


def with_a_number_changed(data: bytes, rng: random.Random) -> bytes:
    """Changes a digit of a text, or of a header that is text, to another number."""
    places = [place for place, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if not places:
        return flipped(data, rng)
    place = rng.choice(places)
    number = rng.choice([b"-1", b"0", b"999999999999", b"1e400", b"nan", b"9" * 400, b'"7"'])
    return data[:place] + number + data[place + 1 :]


def _block(rng: random.Random) -> bytes:
    size = rng.choice([1, 4, 8, 256])
    return rng.choice([b"\x00", b"\xff", b"\x80", rng.randbytes(1)]) * size


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncated, emptied, flipped, overwritten, inserted, repeated, replaced, with_a_number_changed,
)  # fmt: skip
# These are not regular files: reading them like one may wait without end, or never finish.
SPECIAL: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("a FIFO", os.mkfifo),
    ("a socket", lambda file: os.mknod(file, stat.S_IFSOCK | 0o600)),
    ("a device", lambda file: file.symlink_to("/dev/zero")),
    ("a link to itself", lambda file: file.symlink_to(file.name)),
    ("a link to nothing", lambda file: file.symlink_to("nothing")),
)


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one or two files of a folder, and returns what was done, for people."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            break
        file, how = rng.choice(files), rng.choice(_DAMAGES)
        done.append(f"{file.relative_to(folder)} {how(file, files, rng)}")
    return ", ".join(done)


def _change_bytes(file: Path, files: list[Path], rng: random.Random) -> str:
    change = rng.choice(BYTES)
    file.write_bytes(change(file.read_bytes(), rng))
    return change.__name__


def _delete(file: Path, files: list[Path], rng: random.Random) -> str:
    file.unlink()
    return "deleted"


def _copy_another(file: Path, files: list[Path], rng: random.Random) -> str:
    other = rng.choice(files)
    file.write_bytes(other.read_bytes())
    return f"has the content of {other.name}"


def _make_folder(file: Path, files: list[Path], rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "is a folder"


def _make_special(file: Path, files: list[Path], rng: random.Random) -> str:
    name, make = rng.choice(SPECIAL)
    file.unlink()
    make(file)
    return f"is {name}"


# Most of the damage is to bytes, because that gets furthest into a reader.
_DAMAGES = (*[_change_bytes] * 9, _delete, _copy_another, _make_folder, *[_make_special] * 2)
