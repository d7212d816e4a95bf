"""Kaggle's folder with special files or a wrong table, compared with expected errors.

Valid folders are in test_sources.py.
"""

import os

import pytest

from bef_jax.data.sources import rpcam
from bef_jax.errors import UserError


@pytest.fixture
def folder(tmp_path, patches, write):
    return write("rpcam", tmp_path / "raw", patches)


def read(folder):
    return f"list(rpcam.read(data_of('rpcam', {str(folder)!r}, split_ratio=(0.5, 0.3, 0.2))))"


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
@pytest.mark.parametrize("name", ["train_labels.csv", "train/x.tif"])
def test_a_special_file_is_refused(name, kind, folder, special, printed_by):
    special(kind, folder / name)
    assert printed_by(read(folder)) == [f"{folder / name}: is {kind}; name a regular file"]


def test_a_link_to_a_picture_is_read_and_a_broken_link_counts_as_missing(
    folder, make_data, tmp_path
):
    first = min((folder / "train").iterdir())
    os.rename(first, tmp_path / "elsewhere.tif")
    first.symlink_to(tmp_path / "elsewhere.tif")
    data = make_data("rpcam", folder, split_ratio=(0.5, 0.3, 0.2))
    assert sum(len(chunk.labels) for _, chunk in rpcam.read(data)) == 36
    (tmp_path / "elsewhere.tif").unlink()
    with pytest.raises(UserError, match=f"train has no file {first.name}; fetch it"):
        list(rpcam.read(data))


@pytest.mark.parametrize("name", ["../../x", "..", "/etc/x", "a/b", "\x1b[31m"])
def test_an_id_does_not_lead_out_of_the_folder(name, folder, make_data, tmp_path):
    first = min((folder / "train").iterdir())
    # This is the picture that ../../x leads to, so only its place is wrong.
    (tmp_path / "x.tif").write_bytes(first.read_bytes())
    with open(folder / "train_labels.csv", "a") as table:
        table.write(f"{name},1\n")
    with pytest.raises(UserError) as caught:
        list(rpcam.read(make_data("rpcam", folder)))
    shown = name.replace("\x1b", "\\x1b")
    assert f"train_labels.csv line 38: train has no file {shown}.tif" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["x" * 10**6, '"' + "x\n" * 10**6, "x" * 60_000],
    ids=["long", "open quote", "just allowed"],
)
def test_the_error_about_a_long_field_is_short(text, folder, make_data):
    with open(folder / "train_labels.csv", "a") as table:
        table.write(f"{text},1\n")
    with pytest.raises(UserError) as caught:
        list(rpcam.read(make_data("rpcam", folder)))
    assert "train_labels.csv" in str(caught.value) and len(str(caught.value)) < 400


def test_a_line_of_gigabytes_is_refused(folder, printed_by):
    with open(folder / "train_labels.csv", "ab") as table:
        table.truncate(3 << 30)
    (line,) = printed_by(read(folder))
    assert line.startswith(
        f"{folder / 'train_labels.csv'}: has a line of more than 65536 characters"
    )
