"""Tests files of tensors against the libraries that write them, and files that claim to be big."""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from bef_jax.errors import UserError
from bef_jax.models.weights.tensor_files import read_tensors
from tests.memory import growth_of

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev]'")
safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
MOST = 100 << 20  # bytes; attacks below ask for five times as much or more
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
          "bool"]  # fmt: skip


def check_same(found, expected):
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        shown = tensor.to(torch.float32).detach().numpy()
        np.testing.assert_array_equal(np.asarray(found[key], np.float32), shown)


def state_of_all_kinds():
    wide = torch.arange(24.0).reshape(4, 6)
    views = {
        "whole": wide, "turned": wide.T, "part": wide[1:, 2:5], "every second": wide[:, ::2],
        "repeated": wide[:1].expand(3, 6), "number": torch.tensor(2.5), "none": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    kinds = {name: torch.tensor([0, 1, 1]).to(getattr(torch, name)) for name in DTYPES}
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    return OrderedDict(views | kinds | network.state_dict())


# ---- good files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize("of_today", [True, False])
def test_torch_s_two_formats_hold_what_torch_reads(of_today, suffix, tmp_path):
    path, state = tmp_path / f"w{suffix}", state_of_all_kinds()
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict()
    nested = {"epoch": 2**40, "best": 0.5, "state_dict": state, "optimizer": optimiser}
    for saved in (state, nested):
        content = io.BytesIO()
        torch.save(saved, content, _use_new_zipfile_serialization=of_today)
        path.write_bytes(content.getvalue())
        content.seek(0)
        expected = torch.load(content, weights_only=True)
        check_same(read_tensors(path), expected.get("state_dict", expected))


class Python2:
    """A dict as Python 2 pickled it; such files still exist."""

    def __init__(self, items):
        self.items = items

    def __reduce__(self):
        return OrderedDict, ([[key, value] for key, value in self.items.items()],)


@pytest.mark.parametrize("of_today", [True, False])
def test_what_was_saved_under_python_2_is_read(of_today, tmp_path):
    state = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    torch.save(Python2(state), tmp_path / "w.pth", _use_new_zipfile_serialization=of_today)
    check_same(read_tensors(tmp_path / "w.pth"), state)


def test_safetensors_hold_what_its_library_reads(tmp_path):
    whole = np.arange(24).reshape(2, 3, 4)
    tensors = {name: whole.astype(name) for name in DTYPES if name != "bfloat16"}
    tensors |= {"number": np.array(2.5), "none": np.zeros((0, 3))}
    safetensors.save_file(tensors, tmp_path / "w.pth", metadata={"format": "np"})
    found, expected = read_tensors(tmp_path / "w.pth"), safetensors.load_file(tmp_path / "w.pth")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        np.testing.assert_array_equal(found[key], tensor)


def test_bfloat16_of_safetensors_is_read(tmp_path):
    from safetensors.torch import save_file

    state = {"a": torch.tensor([1.5, -3.0]).to(torch.bfloat16)}
    save_file(state, tmp_path / "w.safetensors")
    check_same(read_tensors(tmp_path / "w.safetensors"), state)


# ---- files that claim to be large ---------------------------------------------------------------


class Call:
    """An object whose pickle loads as the result of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Changes the bytes of zip entries, by the last part of their names, or the compression."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(name, change.get(name.rpartition("/")[2], content))


def deflated_storage(path):
    torch.save({"a": torch.zeros(1)}, path)
    rewrite(path, {"0": bytes(600 << 20)}, zipfile.ZIP_DEFLATED)


def deflated_extra(path):
    torch.save({"a": torch.zeros(1)}, path)
    rewrite(path, {"version": bytes(600 << 20)}, zipfile.ZIP_DEFLATED)


def sparse(path):
    torch.save({"a": torch.sparse_coo_tensor([[0], [0]], [1.0], (40_000, 40_000))}, path)


def quantised(path):
    torch.save({"a": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)}, path)


def buffer(path):
    torch.save({"a": Call(bytearray, 1 << 30)}, path)


def unset(path):
    torch.save({"a": Call(torch.Tensor, 40_000, 40_000)}, path)


def memo(path):
    torch.save({"a": torch.zeros(1)}, path)
    rewrite(path, {"data.pkl": b"\x80\x02}r" + (1 << 28).to_bytes(4, "little") + b"."})


def one_list_for_many_dicts(path):
    torch.save({"a": torch.zeros(1)}, path)
    pairs = b"".join(b"](K%cNe" % (row % 256) for row in range(256))
    listed = b"ccollections\nOrderedDict\nq\x00](" + pairs + b"eq\x01"
    pickled = b"\x80\x02](" + listed + b"h\x00h\x01\x85R" * 100_000 + b"e."
    rewrite(path, {"data.pkl": pickled})


def shared_twice(path):
    torch.save({"a": torch.zeros(1)}, path)
    key = b"K\x01" + b"q\x00h\x00\x86" * 60
    rewrite(path, {"data.pkl": b"\x80\x02}" + key + b"Ns."})


def many_objects(path):
    torch.save({"a": torch.zeros(1)}, path)
    rewrite(path, {"data.pkl": b"\x80\x02(" + b"]" * (8 << 20) + b"t."})


def beyond_its_storage(path):
    torch.save({"a": torch.zeros(1).expand(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if "pkl" in name))
    assert pickled.count(b"K\x00\x85") == 1  # a stride of 0
    rewrite(path, {"data.pkl": pickled.replace(b"K\x00\x85", b"K\x01\x85")})


def header(claimed, **entry):
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry})

    def write(path):
        length = claimed or len(text)
        path.write_bytes(length.to_bytes(8, "little") + text.encode() + bytes(4))

    return write


def many_headers(path):
    text = "{" + ",".join(f'"{row}":[]' for row in range(1 << 20)) + "}"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())


ATTACKS = {
    "a deflated storage": (deflated_storage, "is compressed"),
    "a deflated entry that no tensor names": (deflated_extra, "is compressed"),
    "sparse": (sparse, "holds torch"),
    "quantised": (quantised, "holds torch"),
    "a buffer of any length": (buffer, "holds __?builtins?__.bytearray"),
    "a tensor without numbers": (unset, r"holds torch\.Tensor"),
    "a memo's number": (memo, "holds no dict of tensors"),
    "a list that becomes many dicts": (one_list_for_many_dicts, "holds no dict of tensors"),
    "a key that takes years to hash": (shared_twice, "is not text"),
    "a pickle too long": (many_objects, "description is too long"),
    "a tensor beyond its storage": (beyond_its_storage, "holds only tensors"),
    "a header longer than the file": (header(1 << 20), "holds only tensors"),
    "a header of any length": (header(1 << 62), "header is too long"),
    "a header of many tensors": (many_headers, "header is too long"),
    "a shape that is not there": (header(None, shape=[40_000, 40_000]), "holds only tensors"),
    "offsets beyond the file": (header(None, data_offsets=[0, 1 << 40]), "was cut"),
    "offsets before the file": (header(None, data_offsets=[-4, 0]), "was cut"),
    "a shape of another length": (header(None, shape=[0]), "header is damaged"),
    "a type of its own": (header(None, dtype="F8_E4M3"), "type F8_E4M3; save it as F32"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of coming changes
@pytest.mark.parametrize(("write", "message"), ATTACKS.values(), ids=ATTACKS)
def test_what_claims_to_be_large_is_refused_without_memory(write, message, tmp_path):
    path = tmp_path / "w.pth"
    write(path)

    def read():
        with pytest.raises(UserError, match=message) as error:
            read_tensors(path)
        assert len(str(error.value)) < 500

    assert growth_of(read) < MOST


def test_a_tensor_that_repeats_one_number_takes_no_memory(tmp_path):
    """Reads the tensor, because the caller decides whether its shape is right."""
    for of_today in (True, False):
        huge = torch.zeros(1, dtype=torch.float16).expand(40_000, 40_000)
        torch.save({"a": huge}, tmp_path / "w", _use_new_zipfile_serialization=of_today)
        assert growth_of(lambda: read_tensors(tmp_path / "w")) < MOST
        assert read_tensors(tmp_path / "w")["a"].shape == (40_000, 40_000)


# ---- files that are damaged, or of something else -----------------------------------------------


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK", b"PK\3\4" * 30, b"\x80\x02.", b"\x80"])
def test_what_is_no_file_of_tensors_is_told(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth is not a file that holds only tensors"):
        read_tensors(tmp_path / "w.pth")


def test_other_programs_zips_and_pickles_are_told(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.ones(3))
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name in ("w.npz", "w.pkl"):
        with pytest.raises(UserError, match="another program wrote it; give"):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("of_today", [True, False])
def test_a_file_that_was_cut_is_told(of_today, tmp_path):
    torch.save(state_of_all_kinds(), tmp_path / "w", _use_new_zipfile_serialization=of_today)
    whole = (tmp_path / "w").read_bytes()
    for length in range(1, len(whole), len(whole) // 50):
        (tmp_path / "w").write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_tensors(tmp_path / "w")


@pytest.mark.parametrize("numbers", [3, 5])
def test_numbers_that_are_not_as_many_as_described_are_told(numbers, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(4)}, path)
    rewrite(path, {"0": bytes(4 * numbers)})
    with pytest.raises(UserError, match="it was cut, or is damaged; fetch or save it again"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_fifo_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a FIFO; name a regular file"):
        read_tensors(tmp_path / name)
