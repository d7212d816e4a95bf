"""The decoded store: each split as arrays, and a manifest of what they hold.

    <store>/manifest.json
    <store>/{train,valid,test}/{images,labels,ids}.npy, and groups.npy if the source knows them

`prepare` writes a store once from its source; `open_split` opens a split for reading.
"""

import contextlib
import dataclasses
import glob
import itertools
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from bef_jax import hub
from bef_jax.data import sources
from bef_jax.data.chunk import (
    Begin,
    Contents,
    check_id_array,
    check_ids,
    check_images,
    check_label_array,
    check_labels,
    check_texts,
    silent,
)
from bef_jax.data.patch import PCAM_CLASSES, PCAM_SIDE, same_scale
from bef_jax.data.sources import npy
from bef_jax.data.stored.manifest import FORMAT_VERSION, MANIFEST, arrays, read_manifest
from bef_jax.data.stored.rows import StoredRows
from bef_jax.data.stored.writer import StoreWriter
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import (
    check_outputs,
    check_regular,
    first_damaged,
    open_user_file,
    user_path,
    write_json,
    write_text,
)

LOG = logging.getLogger(__name__)

_ELSEWHERE = "set config.data.store (by default the store lies in config.data.dir)"
# Fields that decide what a store holds, and that the first version did not have.
_TABLES = (".csv", ".tsv", ".txt", ".parquet")  # suffixes of a source that is one file
_DECIDING_SINCE_2 = {"classes": [], "patch_size": PCAM_SIDE}


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a store, open for reading.

    Attributes:
        name: train, valid or test.
        images: uint8 [N, S, S, 3], RGB; of a store, rows are read when they are indexed.
        labels: [N], numbers of classes, of the type `patch.label_dtype`.
        ids: str [N].
        groups: str [N], what patches of one slide or patient share; None if it is not known.
        classes: the names of all classes, in the order of their numbers.
    """

    name: str
    images: np.ndarray | StoredRows
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray | None = None
    classes: tuple[str, ...] = PCAM_CLASSES

    def __len__(self) -> int:
        return len(self.labels)


def store_path(data: ConfigDict) -> Path:
    """Returns the folder of the store: `data.store`, or <dir>/store_<source>[_<file>].

    If the source reads no folder, the name also holds what decides its patches, so that variants do
    not collide.
    """
    if data.store:
        return user_path(data.store)
    identity = sources.identity(data)
    # A table has its store beside it, and there may be other tables in its folder.
    is_file = Path(data.dir).suffix.lower() in _TABLES
    of_file = (Path(data.dir).stem,) if is_file else ()
    variant = of_file if "dir" in identity else identity.values()
    name = "_".join(map(str, ("store", data.source, *variant)))
    return user_path(sources.home(data) / name)


def prepare(data: ConfigDict, begin: Begin = silent) -> dict:
    """Writes the store of `data` unless it exists, and returns its manifest.

    The store appears whole, by a rename, or not at all.

    Args:
        data: config.data.
        begin: is called for each long piece of work, to show its progress.

    Raises:
        UserError: the source is refused, a split ends up empty, the store cannot be written, or
            the existing one was made with other fields.
    """
    sources.check(data)
    path = store_path(data)
    # The manifest is written last, before the folder gets its name. So a store that has one is
    # whole.
    if os.path.isfile(path / MANIFEST):
        return _matching_manifest(path, data)
    # If the folder is a link, resolve it, because a rename would not follow it.
    path = path.resolve()
    _check_place(path)
    contents = sources.open_source(data, begin)
    chunks = contents.chunks
    first = next(chunks)  # refuses a missing source before a folder is made
    _check_scale(data, contents.mpp, f"the source {data.source}")
    with _temporary_folder(path) as folder:
        classes = len(contents.classes)
        with StoreWriter(folder, data.rectify, data.patch_size, classes) as writer:
            for split, chunk in itertools.chain([first], chunks):
                writer.add(split, chunk)
            manifest = _manifest(data, contents) | writer.close(begin)
        for name, text in contents.tables().items():
            write_text(folder / name, text)
        write_json(folder / MANIFEST, manifest)
        return _publish(folder, path, data, manifest)


def _check_place(path: Path) -> None:
    """Checks that a store can be made at `path`, because its source can take hours to read."""
    try:
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); {_ELSEWHERE}") from error
    # An empty folder may stay, because the rename replaces it. It cannot replace a mount point.
    if not is_free or os.path.ismount(path):
        raise UserError(f"{path}: exists and is not a store; name another config.data.store")
    check_outputs(_temporary_path(path), fix=_ELSEWHERE)


def open_split(path: Path, split: str) -> Split:
    """Opens one split of the store at `path`; only its images are not read into memory.

    Raises:
        UserError: there is no store or no such split, or files are not as the manifest says.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if not manifest["counts"].get(split):
        there = ", ".join(name for name, count in manifest["counts"].items() if count)
        raise UserError(f"{path}: has no {split} split; it has {there}")
    files = {name: path / split / f"{name}.npy" for name in arrays(manifest)}
    # Comparing sizes costs nothing and names the file.
    for name, file in files.items():
        _check_size(file, manifest["files"][f"{split}/{name}.npy"]["bytes"])
    try:
        return _open(split, manifest, files)
    except Exception as error:  # NumPy's parser of headers raises many kinds of errors
        raise UserError(
            f"{path / split}: damaged ({reason_of(error)}); "
            f"delete {path} and run --mode=prepare again"
        ) from error


def _open(split: str, manifest: dict, files: dict[str, Path]) -> Split:
    """Opens the arrays; everything that they declare is checked before they are read."""
    count, classes = manifest["counts"][split], tuple(manifest["classes"])
    header, offset = _header(files["images"])
    check_images(header.shape, header.dtype, "images", manifest["patch_size"])
    if header.shape[0] != count or header.fortran_order:
        raise ValueError(f"images are not the {count} of the manifest, in C order")
    images = StoredRows(files["images"], offset, header.shape)
    if offset + images.nbytes > files["images"].stat().st_size:
        raise ValueError(f"images are fewer than the {count} of the manifest")
    header, labels = _mapped(files["labels"])
    check_label_array(header.shape, header.dtype, count, "labels")
    ids = _read_texts(files["ids"], count, images.nbytes, "ids")
    check_ids(ids, "ids")
    groups = None
    if "groups" in files:
        groups = _read_texts(files["groups"], count, images.nbytes, "groups")
        check_texts(groups, "groups")
    labels = check_labels(np.array(labels), count, "labels", classes)
    return Split(split, images, labels, ids, groups, classes)


def _read_texts(file: Path, count: int, image_bytes: int, where: str) -> np.ndarray:
    header, texts = _mapped(file)
    check_id_array(header.shape, header.dtype, count, image_bytes, where)
    if header.dtype.kind != "U":
        raise ValueError(f"{where} are {header.dtype}, not text")
    return np.array(texts)  # in memory, as are the labels


def _header(file: Path) -> tuple[npy.Header, int]:
    """Returns the header of a .npy file, and where the values begin."""
    with open_user_file(file) as stream:
        return npy.read_header(stream), stream.tell()


def _mapped(file: Path) -> tuple[npy.Header, np.memmap]:
    header, offset = _header(file)
    # NumPy would use the bytes of the file as addresses of objects in memory.
    if header.dtype.hasobject:
        raise ValueError(f"{file.name} holds objects")
    return header, np.memmap(os.fspath(file), header.dtype, "r", offset, header.shape)


def verify(path: Path, begin: Begin = silent) -> None:
    """Reads every file of the store at `path`, and compares its content with the manifest's sha256.

    This takes as long as the disk takes to read the store, which is 8.4 GiB for PCam. So training
    does not do it; opening a split checks sizes, labels and ids, but does not read the images.

    Args:
        path: of the store.
        begin: is called once, to show the progress.

    Raises:
        UserError: there is no store, or a file is damaged; names the first damaged file.
    """
    files = read_manifest(path)["files"]
    advance = begin("verifying", sum(entry["bytes"] for entry in files.values()), "bytes")
    expected = {name: entry["sha256"] for name, entry in files.items()}
    damaged = first_damaged(path, expected, advance)
    if damaged:
        raise UserError(
            f"{damaged}: damaged, because its sha256 is not the manifest's; "
            f"delete {path} and run --mode=prepare again"
        )


def _check_size(file: Path, expected: int) -> None:
    check_regular(file)
    actual = file.stat().st_size if file.is_file() else 0
    if actual != expected:
        raise UserError(
            f"{file}: {actual} bytes, but its manifest says {expected}; "
            f"delete {file.parents[1]} and run --mode=prepare again"
        )


def _deciding_fields(data: ConfigDict) -> dict:
    """Returns the fields of config.data that decide what a store holds."""
    return {"source": data.source, "rectify": data.rectify} | sources.identity(data)


def _manifest(data: ConfigDict, contents: Contents) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "source": data.source,
        "library_version": _library_version(),
        "config": _deciding_fields(data),
        "classes": list(contents.classes),
        "patch_size": data.patch_size,
        "mpp": contents.mpp or data.mpp or None,
    }


def _library_version() -> str:
    try:
        return metadata.version("bef_jax")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _matching_manifest(path: Path, data: ConfigDict) -> dict:
    """Returns the manifest of the store at `path`, if `data` would make the same store."""
    manifest = read_manifest(path)
    made, wanted = manifest["config"], _deciding_fields(data)
    # A store may be moved, and its source may be deleted. So compare the folders only while both
    # exist.
    if not all(_is_there(fields.get("dir", "")) for fields in (made, wanted)):
        wanted.pop("dir", None)
        wanted.pop("table", None)
    if wanted.get("table", made.get("table")) != made.get("table"):
        raise UserError(
            f"{data.dir}: has changed since the store {path} was made of it; "
            "delete this store, or name another config.data.store"
        )
    # The source may have said what the configuration says now.
    if list(data.classes) == manifest["classes"]:
        wanted.pop("classes", None)
    if data.resize != "mpp" and data.mpp and data.mpp == manifest["mpp"]:
        wanted.pop("mpp", None)
    for field, value in wanted.items():
        if value != made.get(field, _DECIDING_SINCE_2.get(field)):
            raise UserError(
                f"config.data.{field} is {value!r}, but the store {path} was made with "
                f"{made.get(field)!r}; name another config.data.store, or delete this one"
            )
    _check_scale(data, manifest["mpp"], path)
    if "table" not in made:  # the checksum of a table would show that it changed
        LOG.info("using the store %s; delete it if %s has changed", path, data.source)
    return manifest


def _is_there(place: str) -> bool:
    """Returns whether a source can still be compared: what is on a hub always can."""
    return place.startswith(hub.PREFIX) or os.path.exists(place)


def _check_scale(data: ConfigDict, mpp: float | None, where: Path | str) -> None:
    if data.mpp and mpp and not same_scale(data.mpp, mpp):
        raise UserError(
            f"config.data.mpp is {data.mpp}, but {where} has {mpp} micrometres per pixel; leave it "
            "out, or give the right one"
        )


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Makes a folder beside `path`, and removes it at the end if it is still there."""
    folder = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason_of(error)}); {_ELSEWHERE}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary_path(path: Path) -> Path:
    # It is beside the store, because a rename is atomic only within one file system.
    return path.with_name(f"{_prefix(path)}{os.getpid()}")


def _prefix(path: Path) -> str:
    # Others may write theirs to a shared disk. So the name holds the host, and `_temporary_path`
    # adds the process.
    return f"{path.name}.tmp-{platform.node()}-"


def _remove_stale(path: Path) -> None:
    """Removes the folders of killed processes of this host; each can be as large as a store."""
    prefix = _prefix(path)
    for stale in path.parent.glob(f"{glob.escape(prefix)}*"):
        if _is_dead(stale.name.removeprefix(prefix)):
            LOG.info(
                "%s: removed, because its prepare was killed; this one starts from the beginning",
                stale,
            )
            shutil.rmtree(stale, ignore_errors=True)


def _is_dead(pid: str) -> bool:
    """Returns whether the process that made a temporary folder on this host has ended."""
    # Any other text comes from a host whose name begins like ours.
    if not re.fullmatch("[0-9]{1,9}", pid):
        return False
    if int(pid) == os.getpid():  # our folder is not made yet, so an earlier process had our id
        return True
    try:
        # Signal 0 only asks. PermissionError means that the process lives and is another user's.
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _publish(folder: Path, path: Path, data: ConfigDict, manifest: dict) -> dict:
    try:
        os.replace(folder, path)
    except OSError:
        # Another host or process was first. Its store is good if it was made with the same fields.
        if not (path / MANIFEST).is_file():
            raise
        return _matching_manifest(path, data)
    return manifest
