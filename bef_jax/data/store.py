"""The decoded store: each split as memory-mapped arrays, and a manifest of what they hold.

    <store>/manifest.json
    <store>/{train,valid,test}/{images,labels,ids}.npy

`prepare` writes a store once from its source; `open_split` maps a split for reading.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data import sources, synthetic
from bef_jax.data.checksums import first_damaged
from bef_jax.data.chunk import check_images
from bef_jax.data.writer import SPLITS, StoreWriter
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path

FORMAT_VERSION = 1  # a store of another one is refused, not guessed at
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a store, mapped for reading.

    Attributes:
        name: train, valid or test.
        images: uint8 [N, 96, 96, 3], RGB, memory-mapped.
        labels: uint8 [N], 0 or 1.
        ids: str [N].
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def store_path(data: ConfigDict) -> Path:
    """Returns the folder of the store: `data.store`, or <dir>/store_<source>.

    Synthetic stores carry their sizes and seed in the name, so that variants do not collide.
    """
    if data.store:
        return user_path(data.store)
    name = f"store_{data.source}"
    if data.source == "synthetic":
        sizes = [synthetic.size(data, split) for split in SPLITS]
        name += "_" + "_".join(map(str, [*sizes, data.seed]))
    return user_path(data.dir) / name


def prepare(data: ConfigDict, progress: Callable[[str, int], None] | None = None) -> dict:
    """Writes the store of `data` unless it is there, and returns its manifest.

    The store appears whole, by a rename, or not at all.

    Args:
        data: config.data.
        progress: called with the split and the number of its patches read so far.

    Raises:
        UserError: the source is not as it must be, a split ends up empty, or the store that is
            there was made with other fields.
    """
    sources.check(data)
    path = store_path(data)
    # Written last, into a folder that is then renamed: where it is, the store is whole.
    if (path / MANIFEST).is_file():
        return _matching_manifest(path, data)
    # An empty folder may stay: the rename takes its place.
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not a store; name another config.data.store")
    chunks = sources.read(data)
    first = next(chunks)  # a source that is not there is refused before a folder is made
    with _temporary_folder(path) as folder:
        writer = StoreWriter(folder, data.rectify)
        for split, chunk in itertools.chain([first], chunks):
            writer.add(split, chunk)
            if progress:
                progress(split, writer.read_counts[split])
        manifest = _manifest(data) | writer.close()
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        return _publish(folder, path, data, manifest)


def read_manifest(path: Path) -> dict:
    """Returns the manifest of the store at `path`.

    Raises:
        UserError: there is no store, its manifest is damaged, or of another format version.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format_version"]
        if version == FORMAT_VERSION:  # another one may well have other blocks
            _check_blocks(manifest)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no store there; run --mode=prepare first") from error
    # All that damaged JSON, or JSON of another shape, raises; brackets by the thousand recurse.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged; delete {path} and run --mode=prepare again") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: store format {version}, this version reads {FORMAT_VERSION}; "
            "run --mode=prepare with another config.data.store"
        )
    return manifest


def open_split(path: Path, split: str) -> Split:
    """Maps one split of the store at `path`; nothing but labels and ids is read into memory.

    Raises:
        UserError: no store, no such split in it, or files other than the manifest says.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if not manifest["counts"].get(split):
        there = ", ".join(name for name, count in manifest["counts"].items() if count)
        raise UserError(f"{path}: has no {split} split; it has {there}")
    # By size, which costs nothing, and names the file: NumPy would only say that the map is too
    # long.
    for name, entry in manifest["files"].items():
        if name.startswith(f"{split}/"):
            _check_size(path / name, entry["bytes"])
    try:
        # No pickles: one in a store from elsewhere could run code.
        arrays = {
            name: np.load(path / split / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("images", "labels", "ids")
        }
        _check_arrays(**arrays, count=manifest["counts"][split])
    except Exception as error:  # NumPy's parser of headers raises many kinds
        raise UserError(
            f"{path / split}: damaged ({error}); delete {path} and run --mode=prepare again"
        ) from error
    return Split(split, arrays["images"], np.array(arrays["labels"]), np.array(arrays["ids"]))


def _check_arrays(images: np.ndarray, labels: np.ndarray, ids: np.ndarray, count: int) -> None:
    check_images(images.shape, images.dtype, "images")
    if not len(images) == count or labels.shape != (count,) or ids.shape != (count,):
        raise ValueError(f"not the {count} patches of the manifest")
    if labels.dtype != np.uint8 or not np.isin(labels, (0, 1)).all() or ids.dtype.kind != "U":
        raise ValueError("labels or ids are not what prepare writes")


def _check_blocks(manifest: dict) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError where a block is not as written."""
    numbers = [*manifest["counts"].values()]
    numbers += [entry["bytes"] for entry in manifest["files"].values()]
    texts = [entry["sha256"] for entry in manifest["files"].values()]
    texts += [manifest["content"]["total"]]
    # By type, since isinstance takes True for an int.
    if not all(type(number) is int for number in numbers):
        raise ValueError("a count that is no whole number")
    if not all(type(text) is str for text in texts):
        raise ValueError("a checksum that is no text")
    # Tried as they will be used: what is of another kind raises.
    for pair in manifest["class_counts"].values():
        sum(pair)
    manifest["config"].items()
    manifest["duplicates"].items()


def verify(path: Path) -> None:
    """Reads every file of the store at `path`, and compares its content with the manifest's sha256.

    Takes as long as the disk takes to read the store: 8.4 GiB of PCam. So training does not do it;
    it looks at the sizes alone.

    Raises:
        UserError: no store, or naming the first damaged file.
    """
    files = read_manifest(path)["files"]
    damaged = first_damaged(path, {name: entry["sha256"] for name, entry in files.items()})
    if damaged:
        raise UserError(
            f"{damaged}: damaged, its sha256 is not the manifest's; "
            f"delete {path} and run --mode=prepare again"
        )


def _check_size(file: Path, expected: int) -> None:
    actual = file.stat().st_size if file.is_file() else 0
    if actual != expected:
        raise UserError(
            f"{file}: {actual} bytes, its manifest says {expected}; "
            f"delete {file.parents[1]} and run --mode=prepare again"
        )


def _fields(data: ConfigDict) -> dict:
    """Returns the fields of config.data that decide what a store holds."""
    fields = {"source": data.source, "rectify": data.rectify}
    # Drawn from sizes and seed: no folder decides.
    if data.source == "synthetic":
        return (
            fields
            | {f"{split}_size": synthetic.size(data, split) for split in SPLITS}
            | {"seed": data.seed}
        )
    fields |= {"dir": str(user_path(data.dir).resolve())}
    fields |= {f"{split}_size": data[f"{split}_size"] for split in SPLITS}
    # Here alone: a field that changes no patch must not make the store another one.
    if data.source == "rpcam":
        fields["split_ratio"] = list(data.split_ratio)
    return fields


def _manifest(data: ConfigDict) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "source": data.source,
        "library_version": _library_version(),
        "config": _fields(data),
    }


def _library_version() -> str:
    try:
        return metadata.version("bef_jax")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _matching_manifest(path: Path, data: ConfigDict) -> dict:
    """Returns the manifest of the store at `path`, if `data` would make the same store."""
    manifest = read_manifest(path)
    made, wanted = manifest["config"], _fields(data)
    # A store may be moved, or outlive its source: the folder counts while both are there.
    if not all(Path(fields.get("dir", "")).is_dir() for fields in (made, wanted)):
        wanted["dir"] = made.get("dir")
    for field, value in wanted.items():
        if value != made.get(field):
            raise UserError(
                f"config.data.{field} is {value!r}, but the store {path} was made with "
                f"{made.get(field)!r}; name another config.data.store, or delete this one"
            )
    return manifest


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Makes a folder beside `path`, and removes it in the end if it is still there."""
    # Of host and process: on a shared disk others may be writing theirs. Beside the store, as a
    # rename is atomic within one file system only.
    prefix = f"{path.name}.tmp-{platform.node()}-"
    folder = path.with_name(f"{prefix}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What killed processes of this host left, each of up to a store's size.
        for stale in path.parent.glob(f"{prefix}*"):
            if _is_dead(stale.name.removeprefix(prefix)):
                shutil.rmtree(stale, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); set config.data.store") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_dead(pid: str) -> bool:
    """Tells whether the process that made a temporary folder on this host has ended."""
    if not pid.isdigit():  # of a host whose name begins like ours
        return False
    if int(pid) == os.getpid():  # ours is not made yet: an earlier process had our number
        return True
    try:
        # Signal 0 asks, and does nothing. PermissionError: it lives, and is another user's.
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _publish(folder: Path, path: Path, data: ConfigDict, manifest: dict) -> dict:
    try:
        os.replace(folder, path)
    except OSError:
        # Another host or process was first; its store is as good as ours if it is the same.
        if not (path / MANIFEST).is_file():
            raise
        return _matching_manifest(path, data)
    return manifest
