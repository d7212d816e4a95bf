"""Small random patches, writers of the layouts that the sources read, and helpers of tests."""

import csv
import gzip
import hashlib
import os
import shutil
import stat
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from bef_jax.configs.default import get_config
from bef_jax.data.store import Split
from bef_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def expect_error(message, function, *args):
    """Calls function(*args), which must raise a UserError of one line that holds `message`."""
    with pytest.raises(UserError) as caught:
        function(*args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def make_split(name, images, labels=0):
    """Returns a split whose ids are <name>_<row>; a single label is the label of each row."""
    ids = np.array([f"{name}_{row}" for row in range(len(images))])
    return Split(name, images, np.full(len(images), labels, np.uint8), ids)


@pytest.fixture
def special():
    """Returns special(kind, path), which makes a file at `path` that is not a regular one."""

    def make(kind, path):
        path.unlink(missing_ok=True)
        if kind == "a FIFO":
            os.mkfifo(path)
        elif kind == "a socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        else:
            path.symlink_to("/dev/zero")

    return make


@pytest.fixture
def make_data():
    """Returns make(source, folder, **fields), which makes config.data for a source."""

    def make(source, folder, **fields):
        data = get_config().data
        data.update({"source": source, "dir": str(folder), **fields})
        return data

    return make


@pytest.fixture
def patches():
    """Returns {split: (images uint8 [N, 96, 96, 3], labels uint8 [N])} of random pixels."""
    rng = np.random.default_rng(0)
    return {
        split: (
            rng.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8),
            rng.integers(0, 2, n, dtype=np.uint8),
        )
        for split, n in (("train", 20), ("valid", 9), ("test", 7))
    }


@pytest.fixture
def write():
    """Returns write(layout, folder, patches), which lays patches out as users do."""

    def write_layout(layout, folder, patches):
        Path(folder).mkdir(parents=True, exist_ok=True)
        {
            "pcam_hdf5": _write_hdf5,
            "pcam_hdf5_gz": _write_hdf5_gz,
            "rpcam": _write_rpcam,
            "npz": _write_npz,
        }[layout](Path(folder), patches)
        return Path(folder)

    return write_layout


def _write_hdf5(folder, patches):
    for split, (images, labels) in patches.items():
        stem = f"camelyonpatch_level_2_split_{split}"
        with h5py.File(folder / f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=images, chunks=(1, 96, 96, 3), compression="gzip")
        with h5py.File(folder / f"{stem}_y.h5", "w") as file:
            file.create_dataset("y", data=np.reshape(labels, (-1, 1, 1, 1)))


def _write_hdf5_gz(folder, patches):
    _write_hdf5(folder, patches)
    for path in folder.glob("*.h5"):
        with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        path.unlink()


def _write_rpcam(folder, patches):
    (folder / "train").mkdir()
    with open(folder / "train_labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "label"])
        for images, labels in patches.values():
            for image, label in zip(images, labels, strict=True):
                name = hashlib.sha1(image.tobytes()).hexdigest()
                Image.fromarray(image).save(folder / "train" / f"{name}.tif")
                rows.writerow([name, label])


def _write_npz(folder, patches):
    for split, (images, labels) in patches.items():
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
