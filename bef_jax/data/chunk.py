"""The unit that every source yields, and the checks that every source makes."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bef_jax.errors import UserError

IMAGE_SHAPE = (96, 96, 3)
CHUNK_SIZE = 512  # patches, 13.5 MiB: bounds the memory of reading
READ_ORDER = ("test", "valid", "train")  # a patch in two splits is dropped from the later one


class Chunk(NamedTuple):
    """Some patches of one split: n <= CHUNK_SIZE.

    Attributes:
        images: uint8 [n, 96, 96, 3], RGB.
        labels: uint8 [n], 0 or 1.
        ids: str [n], unique within the split.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def ranges(count: int) -> Iterator[slice]:
    """Yields the slices of at most CHUNK_SIZE that cover `count` rows in order."""
    for start in range(0, count, CHUNK_SIZE):
        yield slice(start, min(start + CHUNK_SIZE, count))


def kept(count: int, limit: int | None) -> int:
    """Returns how many of a split's first patches a size of the config keeps; None keeps all."""
    return count if limit is None else min(count, limit)


def batched_rows(rows: Iterable[tuple[np.ndarray, int, str]]) -> Iterator[Chunk]:
    """Stacks (image, label, id) rows into chunks."""
    rows = iter(rows)
    # Not itertools.batched, which Python 3.11 lacks.
    while batch := list(itertools.islice(rows, CHUNK_SIZE)):
        images, labels, ids = zip(*batch, strict=True)
        yield Chunk(np.stack(images), np.asarray(labels, np.uint8), np.asarray(ids, str))


def check_images(shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
    """Checks that an array holds patches: uint8 [N, 96, 96, 3] with N > 0.

    Raises:
        UserError: another shape or dtype, or no patch at all; names `where`.
    """
    # What is there must be pixels as scanned: scaling floats or resampling would be a guess.
    if len(shape) != 4 or tuple(shape[1:]) != IMAGE_SHAPE or dtype != np.uint8:
        raise UserError(
            f"{where}: images must be uint8 [N, 96, 96, 3], not {dtype} {list(shape)}; "
            "cut or resample them to 96x96 RGB first"
        )
    if shape[0] == 0:
        raise UserError(f"{where}: holds no patch; fetch or write the file again")


def check_labels(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Returns `labels` (any integer dtype; [N] or PCam's [N, 1, 1, 1]) as uint8 [N].

    Raises:
        UserError: not one label for each of the `count` images, or one outside {0, 1}.
    """
    flat = np.asarray(labels).reshape(-1)
    # The first axis, too: [1, N] has as many entries, and means something else.
    if flat.size != count or len(labels) != count:
        raise UserError(
            f"{where}: {flat.size} labels for {count} images; each image needs exactly one label"
        )
    # Before the cast, which would turn 0.5 and NaN into a 0.
    wrong = np.flatnonzero(~np.isin(flat, (0, 1)))
    if wrong.size:
        raise UserError(
            f"{where}: label {flat[wrong[0]]} in row {wrong[0]}; "
            "labels must be 0 (normal) or 1 (tumour)"
        )
    return flat.astype(np.uint8)
