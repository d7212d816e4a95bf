"""Files of users and of the program, also damaged and special ones, and their checksums."""

import json
import os
import stat
from pathlib import Path

import pytest

from bef_jax.errors import UserError
from bef_jax.runtime import files
from tests.special_files import BRACKETS, make_special

KINDS = ["folder", "FIFO", "socket", "device"]
LONG_NAME = pytest.param("x" * 300, id="300 letters")


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_special_files_are_refused_at_once(tmp_path, kind):
    path = make_special(kind, tmp_path / "special")
    with pytest.raises(UserError, match=f"{path}: is a {kind}"):
        files.open_user_file(path)
    with pytest.raises(UserError, match=f"is a {kind}"):
        files.read_json(path, dict, "move it away")


def test_a_link_to_a_file_is_read_and_a_missing_file_is_not_found(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with files.open_user_file(tmp_path / "link") as stream:
        assert stream.read() == b"content"
    with pytest.raises(FileNotFoundError):
        files.open_user_file(tmp_path / "nothing")


@pytest.mark.parametrize("given", ["loop", "~no-such-user/x", LONG_NAME, "null\0byte"])
def test_a_path_that_no_file_can_have_is_refused(tmp_path, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot be a path"):
        files.user_path(given)


def test_a_path_need_not_exist_and_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_path("~/a/b") == tmp_path / "a" / "b"
    (tmp_path / "file").touch()
    assert files.user_path("~/file/below") == tmp_path / "file" / "below"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"step": ', BRACKETS, "[]", "3", "null", "{}", '{"step": null}', "\0\0\0",
     '{"step": true}', '{"step": "3"}', '{"step": 3.5}'],
)  # fmt: skip
def test_json_that_was_cut_or_edited_gives_one_line_of_error(tmp_path, text):
    file = tmp_path / "summary.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"summary\.json: damaged .*; delete it") as caught:
        files.read_json(file, lambda found: files.check_types(found, step=int), "delete it")
    assert "\n" not in str(caught.value)


def test_json_with_the_right_types_is_returned(tmp_path):
    file = tmp_path / "summary.json"
    content = {"step": 3, "auc": 1, "valid": None}
    file.write_text(json.dumps(content))
    types = {"step": int, "auc": float, "valid": dict | None}
    assert files.read_json(file, lambda x: files.check_types(x, **types), "") == content


def test_json_that_is_too_long_is_not_read(tmp_path):
    file = tmp_path / "summary.json"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UserError, match="longer than 32 MiB"):
        files.read_json(file, dict, "delete it")


def test_missing_json_raises_file_not_found(tmp_path):
    (tmp_path / "file").touch()
    for file in (tmp_path / "nothing.json", tmp_path / "file" / "nothing.json"):
        with pytest.raises(FileNotFoundError):
            files.read_json(file, dict, "")


# ---- writing ------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "file"
    files.write_bytes(file, b"old")
    with pytest.raises(KeyError), files.replacing(file) as stream:
        stream.write(b"half")
        raise KeyError
    assert file.read_bytes() == b"old"
    files.write_text(file, "new, \u00e4 and \udc80")
    assert file.read_text() == "new, \u00e4 and \\udc80"
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    file = tmp_path / ("x" * 255)  # as long as a name can be
    with files.replacing(file) as first, files.replacing(file) as second:
        first.write(b"first" * 1000)
        second.write(b"second")
    assert file.read_bytes() == b"first" * 1000
    assert len(os.listdir(tmp_path)) == 1


def test_a_new_file_has_the_default_permissions_of_the_user(tmp_path):
    (tmp_path / "theirs").touch()
    files.write_bytes(tmp_path / "ours", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("theirs", "ours")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_something_in_the_way_of_outputs_is_refused(tmp_path, kind):
    path = make_special(kind, tmp_path / "special")
    with pytest.raises(UserError, match="special: is in the way of an output file"):
        files.check_outputs(tmp_path, ["special"])
    if kind != "folder":
        with pytest.raises(UserError, match="special: is in the way of an output folder"):
            files.check_outputs(tmp_path, output_folders=["special"])
        with pytest.raises(UserError, match="special: is not a folder; give another"):
            files.check_outputs(path)
        with pytest.raises(UserError, match="special/run: cannot be written"):
            files.check_outputs(path / "run")


def test_a_name_that_is_too_long_is_found_before_its_folder_exists(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        files.check_outputs(tmp_path / "new" / ("x" * 300) / "run")


def test_checking_outputs_changes_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("nothing")
    files.check_outputs(tmp_path, ["file", "link", "new"], ["folder"])
    files.check_outputs(tmp_path / "a" / "b", ["file"])
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
    assert (tmp_path / "file").read_bytes() == b"old"


# ---- checksums ---------------------------------------------------------------------------------

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def test_sha256_matches_the_example_of_the_standard(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert files.sha256(tmp_path / "file") == ABC


def test_first_damaged_returns_the_first_file_by_name(tmp_path):
    expected = dict.fromkeys(["b", "a", "c/d"], ABC)
    (tmp_path / "c").mkdir()
    for name in expected:
        (tmp_path / name).write_bytes(b"abc")
    assert files.first_damaged(tmp_path, expected) is None
    (tmp_path / "c/d").write_bytes(b"abd")
    assert files.first_damaged(tmp_path, expected) == tmp_path / "c/d"
    (tmp_path / "b").unlink()
    assert files.first_damaged(tmp_path, expected) == tmp_path / "b"


def test_a_name_that_leads_out_of_the_folder_counts_as_damaged(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    (folder := tmp_path / "folder").mkdir()
    for name in ("../abc", str(tmp_path / "abc"), "x/../../abc"):
        assert files.first_damaged(folder, {name: ABC}) == folder / name


def test_a_special_file_or_one_without_an_end_counts_as_damaged(tmp_path, printed_by):
    os.mkfifo(tmp_path / "fifo")
    for name, place in (("zero", "/dev/zero"), ("kmsg", "/proc/kmsg"), ("loop", "loop")):
        (tmp_path / name).symlink_to(place)
    names = ["fifo", "zero", "loop", "a" * 5000, "a\0"]
    # Not every user may read kmsg. For those who may, its size is 0, so nothing of it is read.
    names += ["kmsg"] if os.access("/proc/kmsg", os.R_OK) else []
    call = "files.first_damaged(Path({!r}), {!r})".format
    lines = printed_by(*[call(str(tmp_path), {name: ABC}) for name in names])
    assert lines == [f"read: {tmp_path / name}" for name in names]


def test_progress_counts_every_byte(tmp_path):
    content = bytes(5 << 19)
    (tmp_path / "file").write_bytes(content)
    blocks = []
    assert files.first_damaged(tmp_path, {"file": ABC}, blocks.append) == tmp_path / "file"
    assert sum(blocks) == len(content) and len(blocks) == 3


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="only Linux has this file")
def test_no_more_of_a_system_file_is_read_than_its_size_says():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes
    assert files.sha256(Path("/proc/self/mounts")) == empty
