"""Sets that TFDS's own builder writes, compared with the files from which it made them.

The files are small and local. The sets are read in a process without TensorFlow.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bef_jax.data import sources, store
from bef_jax.data.sources import tfds
from tests.data.sources.conftest import expect_error

ROOT = Path(__file__).resolve().parents[3]

# Arguments: the data_dir, and a folder of PCam's six .h5.gz files.
PREPARE = """
import hashlib, pathlib, sys
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from bef_jax.data.sources.tfds import download_and_prepare

folder, raw = map(pathlib.Path, sys.argv[1:])
(folder / "downloads").mkdir(parents=True)
(folder / "downloads" / "manual").symlink_to(raw.resolve())
# TFDS refuses files with other checksums than the real ones have, so replace them.
tfds.builder_cls("patch_camelyon").url_infos = {
    f"https://zenodo.org/record/2546921/files/{file.name}": checksums.UrlInfo(
        file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest(), file.name
    )
    for file in raw.iterdir()
}
download_and_prepare(folder)
assert "tensorflow" in sys.modules
"""

# TFDS needs TensorFlow to unpack files and to encode arrays as PNG. So this gives it unpacked
# files and Pillow's images.
PREPARE_WITHOUT_TENSORFLOW = """
import pathlib, sys
import tensorflow_datasets as tfds
from PIL import Image
from bef_jax.data.sources.tfds import download_and_prepare

folder, raw = map(pathlib.Path, sys.argv[1:])
builder = tfds.builder_cls("patch_camelyon")
generate = builder._generate_examples

def generate_pillow(self, split, paths):
    for key, example in generate(self, split, paths):
        yield key, example | {"image": Image.fromarray(example["image"])}

builder._generate_examples = generate_pillow
tfds.download.DownloadManager.download_and_extract = lambda self, urls: {
    key: str(raw / pathlib.Path(url).stem) for key, url in urls.items()
}
download_and_prepare(folder)
assert "tensorflow" not in sys.modules
"""

READ = """
import json, pathlib, sys
# Put a TensorFlow that cannot be imported in front of any that is installed.
blocked = pathlib.Path(sys.argv[1]) / "blocked"
blocked.mkdir()
(blocked / "tensorflow.py").write_text("raise ImportError('TensorFlow is blocked')")
sys.path.insert(0, str(blocked))
from bef_jax.data import store
from bef_jax.configs.default import get_config
data = get_config().data
data.update({"source": "tfds", "dir": sys.argv[1]})
print(json.dumps(store.prepare(data)))
assert "tensorflow" not in sys.modules
"""


def run(code, *args):
    command = [sys.executable, "-c", code, *map(str, args)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def prepare(script, layout, folder, patches, write):
    """Makes TFDS write `patches`, in its own process, and returns its data_dir."""
    pytest.importorskip("importlib_resources", reason="TFDS prepares nothing without it")
    raw = write(layout, folder / "raw", patches)
    assert run(script, folder / "tfds", raw) == ""  # stdout is only for the summary
    return folder / "tfds"


def test_tfds_set_is_read_without_tensorflow(tmp_path, patches, write, make_data):
    folder = prepare(PREPARE_WITHOUT_TENSORFLOW, "pcam_hdf5", tmp_path, patches, write)
    manifest = json.loads(run(READ, folder))
    reference = store.prepare(make_data("pcam_hdf5", tmp_path / "raw"))
    assert manifest["content"] == reference["content"]
    tfds_store = store.open_split(folder / "store_tfds", "valid")
    rows = [int(name.removeprefix("pcam_valid_")) for name in tfds_store.ids]
    np.testing.assert_array_equal(tfds_store.images, patches["valid"][0][rows])
    np.testing.assert_array_equal(tfds_store.labels, patches["valid"][1][rows])
    chunks = list(sources.open_source(make_data("tfds", folder, train_size=3)).chunks)
    assert sum(len(chunk.labels) for split, chunk in chunks if split == "train") == 3


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TensorFlow is not installed: TFDS cannot prepare (pip install bef_jax[tfds])",
)
def test_tfds_set_that_tensorflow_prepared_is_read_without_it(tmp_path, patches, write, make_data):
    folder = prepare(PREPARE, "pcam_hdf5_gz", tmp_path, patches, write)
    manifest = json.loads(run(READ, folder))
    reference = store.prepare(make_data("pcam_hdf5", tmp_path / "raw"))
    assert manifest["content"] == reference["content"]


def test_error_about_a_missing_set_says_how_to_prepare_it(tmp_path, make_data):
    expect_error(make_data("tfds", tmp_path), str(tmp_path), "bef_jax[tfds]", "tfds build")
    (tmp_path / "patch_camelyon" / "2.0.0").mkdir(parents=True)
    expect_error(make_data("tfds", tmp_path), str(tmp_path), "bef_jax[tfds]", "tfds build")


def test_preparing_without_tensorflow_says_what_to_install(tmp_path, make_data, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = make_data("tfds", tmp_path, download=True)
    expect_error(data, "needs tensorflow", "bef_jax[tfds]", "pcam_hdf5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((64, 64, 3), np.uint8)}, "images must be uint8"),
        ({"label": 2}, "label 2 in row 0"),
        ({"id": "x" * 2000}, "is an id of more than 1024 characters"),
    ],
)
def test_rows_that_are_not_patches(change, message, tmp_path, make_data, monkeypatch):
    row = {"image": np.zeros((96, 96, 3), np.uint8), "label": 0, "id": "test_0"} | change
    builder = SimpleNamespace(as_data_source=lambda _: [row])
    monkeypatch.setattr(tfds, "_is_prepared", lambda _: True)
    monkeypatch.setattr(tfds, "_builder", lambda _: builder)
    expect_error(make_data("tfds", tmp_path), f"{tmp_path / 'patch_camelyon'}: ", message)


def test_set_in_a_format_that_needs_tensorflow_is_refused(tmp_path, patches, write, make_data):
    folder = prepare(PREPARE_WITHOUT_TENSORFLOW, "pcam_hdf5", tmp_path, patches, write)
    info = folder / "patch_camelyon" / "2.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in list(info.parent.glob("*array_record*")):
        file.rename(str(file).replace("array_record", "tfrecord"))
    expect_error(
        make_data("tfds", folder),
        "can be read without TensorFlow; prepare it again with",
        "--file_format=array_record",
    )


def test_damaged_set_and_special_file_are_named(
    tmp_path, patches, write, make_data, special, printed_by
):
    folder = prepare(PREPARE_WITHOUT_TENSORFLOW, "pcam_hdf5", tmp_path, patches, write)
    info = folder / "patch_camelyon" / "2.0.0" / "dataset_info.json"
    (records,) = info.parent.glob("*train*")
    whole = records.read_bytes()
    damages = {
        records: (whole[:1000], bytes(len(whole)), b""),
        info: (b"{", b"[]", b'{"splits": 3}'),
    }
    for file, contents in damages.items():
        whole = file.read_bytes()
        for content in contents:
            file.write_bytes(content)
            expect_error(make_data("tfds", folder), f"{folder / 'patch_camelyon'}: cannot be read")
        file.write_bytes(whole)
    special("a FIFO", records)
    read = f"list(sources.open_source(data_of('tfds', {str(folder)!r})).chunks)"
    assert printed_by(read) == [f"{records}: is a FIFO; name a regular file"]
