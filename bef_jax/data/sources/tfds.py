"""TensorFlow Datasets' patch_camelyon, read without TensorFlow once it is prepared."""

import contextlib
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.chunk import (
    Begin,
    Chunk,
    Contents,
    batched_rows,
    check_images,
    check_labels,
    counted,
    kept,
    readable,
    silent,
)
from bef_jax.data.patch import READ_ORDER
from bef_jax.data.sources.description import PCAM, folder_identity, numbered_classes
from bef_jax.errors import UserError
from bef_jax.runtime.files import check_regular, user_path

NAME = "patch_camelyon"
FILE_FORMAT = "array_record"  # a data source reads it in any order, without TensorFlow
_BUILD = f"tfds build {NAME} --file_format={FILE_FORMAT}"
TFDS_SPLITS = {"train": "train", "valid": "validation", "test": "test"}

DESCRIPTION = PCAM
identity = folder_identity


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source; its files are looked for when the first chunk is asked for, by `read`."""
    return Contents(read(data, begin), numbered_classes(data), DESCRIPTION.mpp)


def read(data: ConfigDict, begin: Begin = silent) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of patch_camelyon in `data.dir`, a data_dir of TFDS.

    The ids are those of the same patches in `pcam_hdf5`; the order is TFDS's. With `data.download`,
    a missing set is downloaded and prepared, which needs TensorFlow.

    Raises:
        UserError: the set is not prepared, damaged, or not in the array_record format.
    """
    folder = user_path(data.dir)
    if not _is_prepared(folder):
        _prepare(folder, data.download)
    where = str(folder / NAME)
    with _readable(folder):
        builder = _builder(folder)
        for split in READ_ORDER:
            # Read by index, so that patches beyond a size of the config are never read.
            rows = _data_source(builder, TFDS_SPLITS[split])
            count = kept(len(rows), data[f"{split}_size"])
            chunks = batched_rows((_to_row(rows[i]) for i in range(count)), where)
            checked = (_checked(chunk, where) for chunk in chunks)
            yield from counted(split, checked, count, begin)


def download_and_prepare(folder: Path) -> None:
    """Lets TFDS fetch patch_camelyon and write it below `folder`; imports TensorFlow.

    TFDS does not download PCam's .h5.gz files that are in <folder>/downloads/manual.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout is only for the summary
        builder = _builder(folder, file_format=FILE_FORMAT)
        builder.download_and_prepare(file_format=FILE_FORMAT)


def _builder(folder: Path, **options):
    import tensorflow_datasets as tfds

    return tfds.builder(NAME, data_dir=folder, **options)


def _readable(folder: Path) -> contextlib.AbstractContextManager:
    return readable(folder / NAME, f"prepare it again with `{_BUILD}` in another folder")


def _is_prepared(folder: Path) -> bool:
    # TFDS would warn of a missing folder, but the error that follows says it better.
    if not os.path.isdir(folder / NAME):
        return False
    for file in (folder / NAME).rglob("*"):
        if not file.is_dir():
            check_regular(file)
    with _readable(folder):
        return _builder(folder).is_prepared()


def _prepare(folder: Path, download: bool) -> None:
    if not download:
        raise UserError(
            f"{folder}: TFDS has no prepared {NAME} there; install bef_jax[tfds] and set "
            f"--config.data.download=True, or run `{_BUILD} --data_dir={folder}`"
        )
    # Check first, because TFDS imports them only when it needs them, perhaps after the download.
    for module in ("tensorflow", "importlib_resources"):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"config.data.download: TFDS needs {module} to prepare {NAME}; install "
                "bef_jax[tfds], or set config.data.source=pcam_hdf5, which needs no TensorFlow"
            )
    # TensorFlow claims a GPU's whole memory, so it runs in its own process. Spawn that process,
    # because a fork would copy JAX's locks without the threads that hold them, and can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(download_and_prepare, folder).result()


def _data_source(builder, split: str):
    try:
        return builder.as_data_source(split)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{builder.data_dir}: no {split} split that can be read without TensorFlow; prepare "
            f"it again with `{_BUILD}` in another folder"
        ) from error


def _to_row(example: dict) -> tuple[np.ndarray, int, str]:
    name = example["id"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    # TFDS's ids are PCam's name of the split and the row, such as valid_0. With the prefix they
    # equal those of `pcam_hdf5`.
    return example["image"], int(example["label"]), f"pcam_{name}"


def _checked(chunk: Chunk, where: str) -> Chunk:
    check_images(chunk.images.shape, chunk.images.dtype, where)
    check_labels(chunk.labels, len(chunk.images), where)
    return chunk
