"""Checksums against sha256sum's published values and by damage."""

import os
from pathlib import Path

import pytest

from bef_jax.data.checksums import first_damaged, sha256

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def test_sha256_is_the_standard_s(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == ABC


def test_the_first_damaged_file_by_name(tmp_path):
    expected = dict.fromkeys(["b", "a", "c/d"], ABC)
    (tmp_path / "c").mkdir()
    for name in expected:
        (tmp_path / name).write_bytes(b"abc")
    assert first_damaged(tmp_path, expected) is None
    (tmp_path / "c/d").write_bytes(b"abd")
    assert first_damaged(tmp_path, expected) == tmp_path / "c/d"
    (tmp_path / "b").unlink()
    assert first_damaged(tmp_path, expected) == tmp_path / "b"


def test_a_name_that_leads_out_of_the_folder_is_damaged(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    (folder := tmp_path / "folder").mkdir()
    for name in ("../abc", str(tmp_path / "abc"), "x/../../abc"):
        assert first_damaged(folder, {name: ABC}) == folder / name


def test_what_is_no_file_or_has_no_end_is_damaged(tmp_path, say):
    os.mkfifo(tmp_path / "fifo")
    for name, place in (("zero", "/dev/zero"), ("kmsg", "/proc/kmsg"), ("loop", "loop")):
        (tmp_path / name).symlink_to(place)
    names = ["fifo", "zero", "loop", "a" * 5000, "a\0"]
    # It may be read by whoever may: then its size of nothing is believed.
    names += ["kmsg"] if os.access("/proc/kmsg", os.R_OK) else []
    check = "checksums.first_damaged(Path({!r}), {!r})".format
    told = say(*[check(str(tmp_path), {name: ABC}) for name in names])
    assert told == [f"read: {tmp_path / name}" for name in names]


def test_every_byte_is_told(tmp_path):
    content = bytes(5 << 19)
    (tmp_path / "file").write_bytes(content)
    told = []
    assert first_damaged(tmp_path, {"file": ABC}, told.append) == tmp_path / "file"
    assert sum(told) == len(content) and len(told) == 3


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="a file of Linux's")
def test_a_file_of_the_system_s_is_read_for_as_long_as_it_says():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no byte
    assert sha256(Path("/proc/self/mounts")) == empty
