"""Checksums against sha256sum's published values and by damage."""

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
