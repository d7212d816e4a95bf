"""Kaggle's layout of RPCam: train/<id>.tif and train_labels.csv, without a split of its own."""

import csv
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.assignment import check_filled, check_ratio
from bef_jax.data.chunk import Begin, Chunk, Contents, batched_rows, counted, kept, silent
from bef_jax.data.patch import PCAM_SIDE, READ_ORDER
from bef_jax.data.sources.description import PCAM, Description, folder_identity, numbered_classes
from bef_jax.data.sources.listing import table_lines
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import check_regular, open_user_file, user_path

DESCRIPTION = Description(
    shared_slides="yes: the split is random, so patches of one slide are on both sides; "
    "a score is higher than on new slides, and cannot be compared with one on PCam",
    comparable="scores on random splits of RPCam, of which this is one, and not with those on PCam",
    mpp=PCAM.mpp,  # RPCam holds the same patches
)


def identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide which patches are in which split."""
    return folder_identity(data) | {"split_ratio": list(data.split_ratio)}


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source; its files are looked for when the first chunk is asked for, by `read`."""
    return Contents(read(data, begin), numbered_classes(data), DESCRIPTION.mpp)


def read(data: ConfigDict, begin: Begin = silent) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of Kaggle's folder `data.dir`, each split in the order of its ids.

    The hash of a patch's id decides its split, in the ratio `data.split_ratio`.

    Raises:
        UserError: a file is missing, damaged or not a patch, a row of the table is wrong, or
            the ratio leaves a split empty.
    """
    folder = user_path(data.dir)
    # Check the table before decoding, because decoding hundreds of thousands of files takes long,
    # and a missing one would end it.
    labels = _read_labels(folder)
    # Sort the ids, so that the order of the table changes neither the store nor the batches.
    splits = _assign_splits(sorted(labels), data.split_ratio)
    for split in READ_ORDER:
        ids = splits[split][: kept(len(splits[split]), data[f"{split}_size"])]
        # The generator decodes files only when they are needed, so that memory holds one chunk.
        rows = ((_decode(folder / "train" / f"{i}.tif"), labels[i], i) for i in ids)
        yield from counted(split, batched_rows(rows, str(folder / "train")), len(ids), begin)


def split_of(patch_id: str, ratio: Sequence[float]) -> str:
    """Returns the split of the patch with the id `patch_id`, for the shares of train, valid, test.

    It depends only on the id and the ratio, not on the other patches or their order.
    """
    # Do not use hash(), because Python salts it in each process.
    share = int.from_bytes(hashlib.sha256(patch_id.encode()).digest()[:8]) / 2**64 * sum(ratio)
    if share < ratio[0]:
        return "train"
    # A share can reach sum(ratio) itself, because 2**64 - 1 rounds to 2**64. Without a test split,
    # such a patch must not be test.
    return "valid" if share < ratio[0] + ratio[1] or not ratio[2] else "test"


def _assign_splits(ids: Sequence[str], ratio: Sequence[float]) -> dict[str, list[str]]:
    check_ratio(ratio)
    splits = {split: [] for split in READ_ORDER}
    for patch_id in ids:
        splits[split_of(patch_id, ratio)].append(patch_id)
    check_filled(splits, ratio)
    return splits


def _read_labels(folder: Path) -> dict[str, int]:
    """Returns {id: label} of train_labels.csv, which must list each file once and nothing else."""
    table = folder / "train_labels.csv"
    try:
        with open_user_file(table) as file:
            return _parse(file, table, _tif_names(folder / "train"))
    except FileNotFoundError as error:
        raise UserError(f"{table}: no such file; set config.data.dir to its folder") from error
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{table}: cannot be read ({reason_of(error)}); fetch it again") from error


def _tif_names(folder: Path) -> set[str]:
    """Returns the names of a folder's .tif files without the suffix; opens none of them."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set config.data.dir to the folder above it")
    try:
        # List once, because a look at each file would take a round trip each on a network drive.
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name.endswith(".tif")]
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({reason_of(error)}); make it readable"
        ) from error
    return {entry.name.removesuffix(".tif") for entry in found if _is_openable_file(entry)}


def _is_openable_file(entry: os.DirEntry) -> bool:
    """Returns whether the entry can be opened; refuses one that is not a regular file."""
    if entry.is_file(follow_symlinks=False):
        return True
    check_regular(Path(entry.path))
    return os.path.exists(entry.path)


def _parse(file: BinaryIO, table: Path, names: set[str]) -> dict[str, int]:
    # utf-8-sig drops the byte order mark that spreadsheets write first.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(table_lines(text, table))
    if not {"id", "label"} <= set(rows.fieldnames or ()):
        raise UserError(f"{table}: its first line must be id,label")
    labels: dict[str, int] = {}
    for row in rows:
        _add_label(labels, row, names, f"{table} line {rows.line_num}")
    if not labels:
        raise UserError(f"{table}: names no patch; fetch it again")
    if unlabelled := names - labels.keys():
        file_name = table.parent / "train" / f"{min(unlabelled)}.tif"
        raise UserError(f"{file_name}: train_labels.csv has no row for it; add it")
    return labels


def _add_label(labels: dict[str, int], row: dict, names: set[str], where: str) -> None:
    name, label = row["id"], repr(row["label"])[:40]
    if not name:
        raise UserError(f"{where}: no id; each row must be id,label")
    if row["label"] not in ("0", "1"):
        raise UserError(f"{where}: label {label}; it must be 0 (normal) or 1 (tumour)")
    if name in labels:
        raise UserError(
            f"{where}: {name[:100]} has an earlier row; each patch needs exactly one row"
        )
    # This check also keeps paths inside the folder, and rows from outnumbering the files.
    if name not in names:
        raise UserError(f"{where}: train has no file {name[:100]}.tif; fetch it, or remove the row")
    labels[name] = int(row["label"])


def _decode(path: Path) -> np.ndarray:
    """Returns the pixels of a .tif file, uint8 [96, 96, 3]."""
    from bef_jax.data import pictures

    def check_patch(path: Path, header: pictures.Header) -> None:
        height, width = header.height, header.width
        if (height, width) != (PCAM_SIDE, PCAM_SIDE):
            raise UserError(
                f"{path}: {width}x{height} pixels; cut or resample it to 96x96 RGB first"
            )
        if header.mode != "RGB":
            raise UserError(f"{path}: images must be RGB of 8 bits, not {header.mode}; convert it")

    return pictures.read(path, check_patch)
