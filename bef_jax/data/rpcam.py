"""Kaggle's layout of RPCam: train/<id>.tif and train_labels.csv, without a split of its own."""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data import pictures
from bef_jax.data.chunk import (
    IMAGE_SHAPE,
    READ_ORDER,
    Chunk,
    batched_rows,
    kept,
)
from bef_jax.errors import UserError
from bef_jax.runtime.files import user_path


def read(data: ConfigDict) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of Kaggle's folder `data.dir`, each split in the order of its ids.

    A patch's split is decided by the hash of its id, in the ratio `data.split_ratio`.

    Raises:
        UserError: a file is missing, damaged or not a patch, a row of the table is wrong, or
            the ratio leaves a split empty.
    """
    folder = user_path(data.dir)
    labels = _read_labels(folder / "train_labels.csv")
    # Before decoding: hundreds of thousands of files take a while, and one missing stops it.
    _check_files(folder / "train", labels)
    # Sorted: the same store, and so the same batches, whatever the order of the table.
    splits = _assign_splits(sorted(labels), data.split_ratio)
    for split in READ_ORDER:
        ids = splits[split][: kept(len(splits[split]), data[f"{split}_size"])]
        # Decoded as they are asked for, so that memory holds one chunk.
        rows = ((_decode(folder / "train" / f"{i}.tif"), labels[i], i) for i in ids)
        for chunk in batched_rows(rows):
            yield split, chunk


def split_of(name: str, ratio: Sequence[float]) -> str:
    """Returns the split of the patch with the id `name`, for the shares of train, valid, test.

    It depends on nothing but the id and the ratio: not on the other patches, nor on their order.
    """
    # Not hash(), which Python salts in each process.
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 * sum(ratio)
    if share < ratio[0]:
        return "train"
    # A share can come to sum(ratio) itself, as 2**64 - 1 rounds to 2**64: without a test split that
    # must not be test.
    return "valid" if share < ratio[0] + ratio[1] or not ratio[2] else "test"


def _assign_splits(ids: Sequence[str], ratio: Sequence[float]) -> dict[str, list[str]]:
    if len(ratio) != 3 or min(ratio) < 0 or min(ratio[:2]) == 0:
        raise UserError(
            f"config.data.split_ratio is {tuple(ratio)}; "
            "set the shares of train, valid and test, the first two above 0"
        )
    splits = {split: [] for split in READ_ORDER}
    for name in ids:
        splits[split_of(name, ratio)].append(name)
    for split, share in zip(("train", "valid", "test"), ratio, strict=True):
        if share and not splits[split]:
            raise UserError(
                f"config.data.split_ratio leaves no patch of {len(ids)} for the {split} split; "
                "give it a larger share, or use more patches"
            )
    return splits


def _read_labels(path: Path) -> dict[str, int]:
    """Returns {id: label} of train_labels.csv."""
    labels = {}
    try:
        # utf-8-sig drops the mark that spreadsheets put in front.
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if not {"id", "label"} <= set(table.fieldnames or ()):
                raise UserError(f"{path}: its first line must be id,label")
            for row in table:
                _add_label(labels, row, f"{path} line {table.line_num}")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; set config.data.dir to its folder") from error
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from error
    if not labels:
        raise UserError(f"{path}: names no patch; fetch it again")
    return labels


def _add_label(labels: dict[str, int], row: dict, where: str) -> None:
    name = row["id"]
    if not name:
        raise UserError(f"{where}: no id; each row must be id,label")
    if row["label"] not in ("0", "1"):
        raise UserError(f"{where}: label {row['label']!r}; it must be 0 (normal) or 1 (tumour)")
    if name in labels:
        raise UserError(f"{where}: {name} was there before; each patch needs exactly one row")
    # By id, not by row: files are found by it, and splits decided.
    labels[name] = int(row["label"])


def _check_files(folder: Path, labels: dict[str, int]) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set config.data.dir to the folder above it")
    # One listing of the folder: a look at each file would be a round trip each on a network drive.
    files = {file.stem for file in folder.glob("*.tif")}
    for missing in sorted(labels.keys() - files)[:1]:
        raise UserError(f"{folder / missing}.tif: no such file, but train_labels.csv has its label")
    for unlabelled in sorted(files - labels.keys())[:1]:
        raise UserError(f"{folder / unlabelled}.tif: train_labels.csv has no row for it; add it")


def _decode(path: Path) -> np.ndarray:
    """Returns the pixels of a .tif file, uint8 [96, 96, 3]."""
    return pictures.read(path, _check_patch)


def _check_patch(path: Path, header: pictures.Header) -> None:
    height, width = header.height, header.width
    if (height, width) != IMAGE_SHAPE[:2]:
        raise UserError(f"{path}: {width}x{height} pixels; cut or resample it to 96x96 RGB first")
    if header.mode != "RGB":
        raise UserError(f"{path}: images must be RGB of 8 bits, not {header.mode}; convert it")
