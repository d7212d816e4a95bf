"""The entry points: how to make a good input, how to read it, and how to check what was read.

Each `make` writes a small good input into a folder. Each `read` reads the folder as the command
line would, and checks what it got. A UserError is a refusal; any other exception is a bug.
"""

import functools
import gzip
import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from bef_jax.config import flatten, validate
from bef_jax.configs import default, quickstart
from bef_jax.data import inputs, store
from bef_jax.data.patch import SPLITS, Tiling
from bef_jax.errors import UserError
from bef_jax.models import weights
from bef_jax.models.weights import reading
from bef_jax.models.weights.parameter_names import TIMM
from bef_jax.runtime import sharding
from bef_jax.training import checkpoint
from bef_jax.training.checkpoint import Checkpoints
from bef_jax.training.state import TrainState
from tests.fuzz import claims, outputs, own

SIZES = {"train": 6, "valid": 3, "test": 3}


@dataclass(frozen=True)
class Entry:
    make: Callable[[Path, random.Random], None]
    read: Callable[[Path], None]


def patches(rng: random.Random, n: int) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(rng.randrange(2**32))
    images = noise.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)
    return images, noise.integers(0, 2, n, dtype=np.uint8)


def maybe_odd(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """Returns the array with another dtype, shape or content; in most calls it stays as it is."""
    # Text can't become numbers. An array of objects becomes a pickle in an npz.
    text = array.dtype.kind == "U"
    dtypes = ["U3", "U9", "O"] if text else ["f4", "f8", "i1", "i8", "u2", "S3", "U9", "?", "c8"]
    kinds = [
        lambda: array.astype(rng.choice(dtypes)),
        lambda: array[: rng.randrange(len(array) + 1)],
        lambda: array.reshape(-1),
        lambda: array[..., :1],
        lambda: np.concatenate([array, array]),
        lambda: np.full(array.shape, rng.choice([np.nan, np.inf, -1, 2, 255, 1e300])),
        lambda: np.asfortranarray(array),
        lambda: np.zeros((0, *array.shape[1:]), array.dtype),
        lambda: np.array(7),
    ]
    return rng.choice(kinds)() if rng.random() < 0.2 else array


# ---- sources, through prepare -------------------------------------------------------------------


def _prepare(source: str, folder: Path) -> None:
    data = default.get_config().data
    data.update({"source": source, "dir": str(folder), "store": str(folder / "the_store")})
    before = sorted(folder.iterdir())
    try:
        manifest = store.prepare(data)
    except UserError:
        assert sorted(folder.iterdir()) == before, "a refused source left something behind"
        raise
    store.verify(folder / "the_store")
    for split in [name for name, count in manifest["counts"].items() if count]:
        _check_split(store.open_split(folder / "the_store", split))
    shutil.rmtree(folder / "the_store")


def _check_split(split: store.Split) -> None:
    assert split.images.shape == (len(split), 96, 96, 3)
    assert split.images.dtype == np.uint8
    assert len(split.ids) == len(split) > 0
    assert set(split.labels.tolist()) <= {0, 1}
    np.asarray(split.images)


def _npz(folder: Path, rng: random.Random) -> None:
    save = rng.choice([np.savez, np.savez_compressed])
    for split, n in SIZES.items():
        images, labels = patches(rng, n)
        ids = np.array([f"{split} {row}, \u00e4" for row in range(n)])
        arrays = {"images": images, "labels": labels, "ids": ids}
        save(
            folder / f"{split}.npz",
            **{name: maybe_odd(array, rng) for name, array in arrays.items()},
        )


def _hdf5(folder: Path, rng: random.Random) -> None:
    for split, n in SIZES.items():
        stem = f"camelyonpatch_level_2_split_{split}"
        images, labels = patches(rng, n)
        for name, array in (("x", images), ("y", labels.reshape(-1, 1, 1, 1))):
            array = maybe_odd(array, rng)
            array = array.astype("S9") if array.dtype.kind == "U" else array
            packing = {"compression": "gzip"} if array.size > 1 and rng.random() < 0.5 else {}
            with h5py.File(folder / f"{stem}_{name}.h5", "w") as file:
                file.create_dataset(name, data=array, **packing)


def _hdf5_gz(folder: Path, rng: random.Random) -> None:
    _hdf5(folder, rng)
    for path in list(folder.glob("*.h5")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()


def _rpcam(folder: Path, rng: random.Random) -> None:
    (folder / "train").mkdir()
    images, labels = patches(rng, 24)
    kind = rng.choice(["raw", "tiff_lzw", "tiff_deflate", "jpeg"])
    for row, image in enumerate(images):
        image = Image.fromarray(image if rng.random() < 0.99 else image[:1, :1])
        image.save(folder / "train" / f"id \u00e9 {row}.tif", compression=kind)
    rows = [f"id \u00e9 {row},{label}" for row, label in enumerate(labels)]
    end, mark = rng.choice(["\n", "\r\n"]), rng.choice(["", "\ufeff"])
    text = mark + end.join(["id,label", *rows, ""])
    (folder / "train_labels.csv").write_bytes(text.encode())


def _image_folder(folder: Path, rng: random.Random) -> None:
    """Writes a folder for each class, some of them with pictures that are no patches."""
    for label in ("normal", "tumour \u2764"):
        (folder / label).mkdir()
        images, _ = patches(rng, 12)
        for row, image in enumerate(images):
            suffix = rng.choice([".png", ".jpg", ".tif", ".webp", ".bmp"])
            image = image if rng.random() < 0.99 else image[:95]
            Image.fromarray(image).save(folder / label / f"P{row % 4} {row}{suffix}")


def _csv(folder: Path, rng: random.Random) -> None:
    """Writes pictures and their table, in the dialects of spreadsheets."""
    (folder / "pictures").mkdir()
    images, labels = patches(rng, 24)
    mark = rng.choice([",", ";", "\t"])
    rows = [f"path{mark}label{mark}group"]
    for row, image in enumerate(images):
        name = f"pictures/{row}.png"
        Image.fromarray(image).save(folder / name)
        rows.append(f"{name}{mark}class {labels[row]}{mark}P{row % 8}")
    text = rng.choice(["", "\ufeff"]) + rng.choice(["\n", "\r\n"]).join([*rows, ""])
    (folder / "patches.csv").write_bytes(text.encode())


# ---- inputs to score, through predict -----------------------------------------------------------


def _pictures(folder: Path, rng: random.Random) -> None:
    """Writes patches and larger pictures, in the formats, modes and compressions of Pillow."""
    noise = np.random.default_rng(rng.randrange(2**32))
    for number in range(rng.choice([1, 2, 4])):
        shape = (rng.choice([1, 95, 96, 96, 96, 97, 130]), rng.choice([96, 96, 96, 200]), 4)
        pixels = Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8))
        suffix, modes, packings = rng.choice(_FORMATS)
        mode = rng.choice(modes)
        gray = pixels.convert("L") if mode[0] in "IF" else pixels  # the way to more than 8 bits
        gray.convert(mode).save(folder / f"\u00e4 {number}{suffix}", **rng.choice(packings))


_TIFF = [{}, *({"compression": name} for name in ("tiff_lzw", "tiff_deflate", "packbits"))]
_FORMATS = [
    (".png", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"], [{}]),
    (".jpg", ["RGB", "L", "CMYK"], [{}, {"progressive": True}]),
    (".tif", ["RGB", "RGBA", "L", "CMYK", "F", "I", "I;16"], _TIFF),
    (".webp", ["RGB", "RGBA", "L"], [{}, {"lossless": True}]),
    (".bmp", ["RGB", "L", "P", "1"], [{}]),
]


def _npz_to_score(folder: Path, rng: random.Random) -> None:
    images, _ = patches(rng, 5)
    ids = np.array([f"patch {row}" for row in range(len(images))])
    named = {"ids": maybe_odd(ids, rng)} if rng.random() < 0.5 else {}
    np.savez(folder / "patches.npz", images=maybe_odd(images, rng), **named)


def _hdf5_to_score(folder: Path, rng: random.Random) -> None:
    images = maybe_odd(patches(rng, 5)[0], rng)
    with h5py.File(folder / "patches.h5", "w") as file:
        file["x"] = images.astype("S9") if images.dtype.kind == "U" else images


def _read_input(path: Path) -> None:
    inputs.check(path, split=None, side=96)
    ids = set()
    # Do not read all windows of a large picture, because that would exceed an input's time.
    for patch in itertools.islice(inputs.read(path, None, Tiling(96, 32, 32)), 1000):
        assert patch.pixels.shape == (96, 96, 3)
        assert patch.pixels.dtype == np.uint8
        assert patch.id not in ids
        ids.add(patch.id)
    assert ids


# ---- files that the program wrote itself --------------------------------------------------------


@functools.cache
def _good_store() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        data = default.get_config().data
        data.update({"source": "npz", "dir": folder, "store": f"{folder}/the_store"})
        for split, n in SIZES.items():
            images, labels = patches(random.Random(split), n)
            np.savez(Path(folder) / f"{split}.npz", images=images, labels=labels)
        store.prepare(data)
        return _contents(Path(folder) / "the_store")


def _contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _write(contents: dict[str, bytes], folder: Path) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _open_store(folder: Path) -> None:
    for split in SPLITS:
        _check_split(store.open_split(folder, split))
    store.verify(folder)


STATE = TrainState(jnp.asarray(3, jnp.int32), {"kernel": jnp.arange(6.0)}, {}, None, ())


@functools.cache
def _good_checkpoint() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=2)
        config = json.loads(quickstart.get_config().to_json_best_effort())
        checkpoints.save(3, STATE, {"config": config}, auc=0.5)
        checkpoints.close()
        return _contents(Path(folder))


def _open_checkpoint(folder: Path) -> None:
    path = checkpoint.best(folder)
    checkpoint.check_fits(checkpoint.read_metadata(path)["config"], quickstart.get_config(), path)
    everywhere = sharding.replicated(sharding.make_mesh())
    state = checkpoint.restore(path, jax.eval_shape(lambda: STATE), everywhere)
    np.testing.assert_array_equal(state.params["kernel"], STATE.params["kernel"])


# ---- weights ------------------------------------------------------------------------------------


def _model() -> ConfigDict:
    model = default.get_config().model
    model.name = "efficientnet_b0"
    return model


@functools.cache
def _shapes() -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in reading._shapes(_model()).items()}


def _tensors(rng: random.Random) -> dict[str, np.ndarray]:
    """Returns tensors with timm's names, all so small that their shapes must be refused."""
    names = reading._names(Path("weights"), TIMM, _model(), _shapes())
    kept = {ours: theirs for ours, theirs in names.items() if rng.random() < 0.99}
    noise = np.random.default_rng(rng.randrange(2**32))
    return {theirs: maybe_odd(noise.normal(size=(2, 3)), rng) for theirs in kept.values()}


def _safetensors(folder: Path, rng: random.Random) -> None:
    import safetensors.numpy

    kinds = {"f", "i", "u", "b"}
    tensors = {
        k: np.ascontiguousarray(x) for k, x in _tensors(rng).items() if x.dtype.kind in kinds
    }
    safetensors.numpy.save_file(tensors, folder / "weights.safetensors")


def _pth(folder: Path, rng: random.Random) -> None:
    import torch

    tensors = {k: x for k, x in _tensors(rng).items() if x.dtype.kind in "fiub"}
    state = {key: torch.from_numpy(np.array(x)) for key, x in tensors.items()}
    held = [state, {"state_dict": state}, [state], {"state_dict": 3}, {"a": {"b": state}}, None]
    torch.save(rng.choice(held), folder / "weights.pth")


def _read_weights(name: str, folder: Path) -> None:
    """Reads weights that must be refused, because none of them are good."""
    weights.read(folder / name, _model())
    raise AssertionError("weights of wrong shapes were taken")


# ---- the command line ---------------------------------------------------------------------------

_VALUES = [
    "", "0", "-1", "1", "2", "3.5", "1e400", "nan", "inf", "None", "True", "false", "()", "(1,)",
    "(0.8,0.1,0.1)", "(1,2", "9" * 400, "'", '"', "\x00", "\u00e4", "../..", "/", "{}", "[[[",
    "__import__('os')", "efficientnet_b0", "resnet50", "cbam", "16", "32", "host", "a,b=c", "=",
    "lambda: 0",
]  # fmt: skip


def _config(folder: Path, rng: random.Random) -> None:
    fields = [*flatten(default.get_config()), "nosuch", "model", "data", "", "model.name.x"]
    pairs = [(rng.choice(fields), rng.choice(_VALUES)) for _ in range(rng.choice([1, 1, 2, 5]))]
    (folder / "arguments.json").write_text(json.dumps([f"{key}={value}" for key, value in pairs]))


def _read_config(folder: Path) -> None:
    if not (folder / "arguments.json").is_file():
        return
    try:
        arguments = json.loads((folder / "arguments.json").read_text())
        arguments = [text for text in arguments if isinstance(text, str)]
    except (OSError, ValueError, RecursionError, TypeError):
        return  # the damage was to our own file of arguments
    config = default.get_config()
    try:
        for argument in arguments:
            config = default.apply_arg(config, argument)
    except ValueError as error:  # main prints it, as it does for a mistake in any flag
        raise UserError(str(error)) from error
    validate(config)


ENTRIES = {
    "config": Entry(_config, _read_config),
    "npz": Entry(_npz, functools.partial(_prepare, "npz")),
    "pcam_hdf5": Entry(_hdf5, functools.partial(_prepare, "pcam_hdf5")),
    "pcam_hdf5.gz": Entry(_hdf5_gz, functools.partial(_prepare, "pcam_hdf5")),
    "pictures": Entry(_pictures, _read_input),
    "npz_to_score": Entry(_npz_to_score, lambda folder: _read_input(folder / "patches.npz")),
    "hdf5_to_score": Entry(_hdf5_to_score, lambda folder: _read_input(folder / "patches.h5")),
    "rpcam": Entry(_rpcam, functools.partial(_prepare, "rpcam")),
    "image_folder": Entry(_image_folder, functools.partial(_prepare, "image_folder")),
    "csv": Entry(_csv, functools.partial(_prepare, "csv")),
    "store": Entry(lambda folder, _: _write(_good_store(), folder), _open_store),
    "checkpoint": Entry(lambda folder, _: _write(_good_checkpoint(), folder), _open_checkpoint),
    "safetensors": Entry(_safetensors, functools.partial(_read_weights, "weights.safetensors")),
    "pth": Entry(_pth, functools.partial(_read_weights, "weights.pth")),
    "huge npz": Entry(claims.npz, lambda folder: _read_input(folder / "patches.npz")),
    "huge hdf5": Entry(claims.hdf5, lambda folder: _read_input(folder / "patches.h5")),
    "huge hdf5.gz": Entry(claims.hdf5_gz, lambda folder: _read_input(folder / "patches.h5.gz")),
    "huge picture": Entry(claims.picture, _read_input),
    "huge pth": Entry(claims.pth, functools.partial(_read_weights, "weights.pth")),
    "own files": Entry(own.write, own.read),
    "names": Entry(outputs.names, outputs.write_names),
    "two at once": Entry(outputs.rows_of_two, outputs.write_two),
}
