"""Chunks, and the checks of the arrays that they are made of.

A chunk is what every source yields: up to 512 patches of one split, with their labels and ids. A
source is read chunk by chunk, so that memory does not grow with it.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bef_jax.configs.fields import PATCH_SIDES
from bef_jax.data.patch import PCAM_CLASSES, PCAM_SIDE, label_dtype
from bef_jax.errors import UserError, reason_of

CHUNK_SIZE = 512  # patches, 13.5 MiB at 96 px; limits the memory that reading takes
DEFLATE_RATIO = 1032  # the most bytes that one byte of deflate can unpack to
LONGEST_ID = 1024  # characters
_IDS_ALWAYS_ALLOWED = 256 << 20  # bytes of memory that the ids of any file may take

# begin(name, total, unit) announces a long piece of work and returns a function. That function is
# called with how much more of the work is done. The unit is "patches", "slides" or "bytes".
Begin = Callable[[str, int, str], Callable[[int], object]]


def silent(name: str, total: int, unit: str) -> Callable[[int], object]:
    """Begins work whose progress is not shown."""
    del name, total, unit
    return lambda _: None


class Chunk(NamedTuple):
    """Some patches of one split: n <= CHUNK_SIZE.

    Attributes:
        images: uint8 [n, S, S, 3], RGB.
        labels: [n], numbers of classes, of the type `patch.label_dtype`.
        ids: str [n], unique within the split.
        groups: str [n], what patches of one slide or patient share; None if it is not known.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray | None = None


class Contents(NamedTuple):
    """What a source holds, while it is read.

    Attributes:
        chunks: (split, chunk) in READ_ORDER, each split whole. Memory does not grow with it.
        classes: the names of the classes, in the order of their labels.
        mpp: micrometres per pixel, or None if the source does not say.
        tables: returns more text files of the store, by name; called after all chunks were read.
    """

    chunks: Iterator[tuple[str, Chunk]]
    classes: tuple[str, ...] = PCAM_CLASSES
    mpp: float | None = None
    tables: Callable[[], Mapping[str, str]] = dict


def counted(
    split: str, chunks: Iterable[Chunk], total: int, begin: Begin
) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk), and reports how many of the `total` patches are done."""
    advance = begin(f"reading {split}", total, "patches")
    for chunk in chunks:
        yield split, chunk
        # Report after the yield, when the caller has written the chunk.
        advance(len(chunk.labels))


def short_name(file_name: str) -> str:
    """Returns the name of one of PCam's files without the prefix that all of them share."""
    return file_name.removeprefix("camelyonpatch_level_2_")


@contextlib.contextmanager
def readable(path: Path, fix: str) -> Iterator[None]:
    """Turns any error of a library about a damaged file into a UserError.

    Args:
        path: the file that the body reads, or the folder of the files.
        fix: what a user can do about it; it becomes the end of the error.
    """
    try:
        yield
    except UserError:
        raise
    # zipfile, HDF5, TFDS and NumPy's parser of headers raise errors of any kind, depending on where
    # in the file the damage is.
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); {fix}") from error


def ranges(count: int) -> Iterator[slice]:
    """Yields the slices of at most CHUNK_SIZE that cover `count` rows in order."""
    for start in range(0, count, CHUNK_SIZE):
        yield slice(start, min(start + CHUNK_SIZE, count))


def kept(count: int, limit: int | None) -> int:
    """Returns how many of a split's `count` patches to keep: at most `limit`, or all for None."""
    return count if limit is None else min(count, limit)


def batched_rows(rows: Iterable[tuple[np.ndarray, int, str]], where: str) -> Iterator[Chunk]:
    """Stacks (image, label, id) rows into chunks.

    Raises:
        UserError: an id is too long; names `where`, from which the rows were read.
    """
    rows = iter(rows)
    # Python 3.11 lacks itertools.batched.
    while batch := list(itertools.islice(rows, CHUNK_SIZE)):
        images, labels, ids = zip(*batch, strict=True)
        # Every row of an array of text takes as much memory as the longest one.
        if len(longest := max(ids, key=len)) > LONGEST_ID:
            raise UserError(
                f"{where}: {longest[:100]} is an id of more than {LONGEST_ID} characters; "
                "shorten it"
            )
        yield Chunk(np.stack(images), np.asarray(labels, np.uint8), np.asarray(ids, str))


def numbered(prefix: str, rows: slice) -> np.ndarray:
    """Returns ids of the form <prefix>_<row>, for rows that have no ids of their own."""
    return np.asarray([f"{prefix}_{row}" for row in range(rows.start, rows.stop)])


# ---- checks of what an array declares, before it is read ----------------------------------------


def describe_array(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """Returns dtype and shape, cut to 100 characters: a file can declare a thousand axes."""
    return f"{dtype} {list(shape)}"[:100]


def check_images(
    shape: tuple[int, ...], dtype: np.dtype, where: str, side: int = PCAM_SIDE
) -> None:
    """Checks that an array holds patches: uint8 [N, side, side, 3] with N > 0.

    Raises:
        UserError: another shape or dtype, or no patch at all; names `where`.
    """
    # Accept only pixels as they were scanned, because to scale or resample others would be a guess.
    has_patch_shape = len(shape) == 4 and tuple(shape[1:]) == (side, side, 3)
    if not has_patch_shape or dtype != np.uint8:
        fix = "convert them to uint8" if has_patch_shape else _fix_of_shape(shape, side)
        raise UserError(
            f"{where}: images must be uint8 [N, {side}, {side}, 3], "
            f"not {describe_array(shape, dtype)}; {fix} first"
        )
    if shape[0] <= 0:
        raise UserError(f"{where}: holds no patch; fetch or write the file again")


def _fix_of_shape(shape: tuple[int, ...], side: int) -> str:
    is_square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
    fits = is_square and PATCH_SIDES[0] <= shape[1] <= PATCH_SIDES[1]
    field = f"set --config.data.patch_size={shape[1]}, or " if fits else ""
    return f"{field}cut or resample them to {side}x{side} RGB"


def check_label_array(shape: tuple[int, ...], dtype: np.dtype, count: int, where: str) -> None:
    """Checks that an array has a number for each of `count` images: [N] or PCam's [N, 1, 1, 1].

    Raises:
        UserError: another shape, or values that are not real numbers; names `where`.
    """
    # Check the first axis too, because [1, N] has as many entries but means something else.
    if math.prod(shape) != count or tuple(shape[:1]) != (count,):
        raise UserError(
            f"{where}: labels are {describe_array(shape, dtype)} for {count} images; "
            "each image needs exactly one label"
        )
    # Refuse texts before they are read, because each of them could have a gigabyte.
    if dtype.kind not in "biuf":
        raise UserError(
            f"{where}: {describe_array(shape, dtype)}; labels must be numbers of classes, from 0 on"
        )


def check_id_array(
    shape: tuple[int, ...], dtype: np.dtype, count: int, file_bytes: int, where: str
) -> None:
    """Checks that an array has a text (or a number) for each of `count` images.

    Args:
        file_bytes: size of the file, or of the images. Ids may take an eighth of it in memory, but
            256 MiB are always allowed.

    Raises:
        UserError: another shape, other values, or texts that are too long; names `where`.
    """
    # A number counts as 32 characters, the width that NumPy gives a float64 as text.
    letters = {"U": dtype.itemsize // 4, "S": dtype.itemsize}.get(dtype.kind, 32)
    if tuple(shape) != (count,) or dtype.kind not in "SUbiuf" or letters > LONGEST_ID:
        raise UserError(
            f"{where}: ids are {describe_array(shape, dtype)} for {count} images; "
            "write one short text for each"
        )
    # In memory each id takes as much as the longest one, at four bytes per character.
    if count * letters * 4 > max(_IDS_ALWAYS_ALLOWED, file_bytes // 8):
        raise UserError(f"{where}: {count} ids of {letters} characters; write shorter ids")


# ---- checks of what an array holds --------------------------------------------------------------


def check_labels(
    labels: np.ndarray, count: int, where: str, classes: Sequence[str] = PCAM_CLASSES
) -> np.ndarray:
    """Returns `labels` (any real dtype; [N] or PCam's [N, 1, 1, 1]) as [N] of `label_dtype`.

    Raises:
        UserError: not one label for each of the `count` images, or one that is no class's number.
    """
    check_label_array(labels.shape, labels.dtype, count, where)
    flat = labels.reshape(-1)
    # Check before the cast, which would turn 0.5 and NaN into 0.
    wrong = np.flatnonzero(~np.isin(flat, np.arange(len(classes))))
    if wrong.size:
        numbers = "0 (normal) or 1 (tumour)" if classes == PCAM_CLASSES else _numbers(classes)
        raise UserError(
            f"{where}: label {flat[wrong[0]]} in row {wrong[0]}; labels must be {numbers}"
        )
    return flat.astype(label_dtype(len(classes)))


def _numbers(classes: Sequence[str]) -> str:
    return f"0 .. {len(classes) - 1}, for the {len(classes)} of config.data.classes"


def check_texts(texts: np.ndarray, where: str) -> list[str]:
    """Returns str [N] as a list, and checks that it is valid text.

    Raises:
        UserError: UTF-8 cannot hold one of them, which would end a run when it is written.
    """
    try:
        names = texts.tolist()
        "".join(names).encode()
    # NumPy raises SystemError for a code point that does not exist.
    except (ValueError, SystemError) as error:
        row = next(row for row in range(len(texts)) if not _is_text(texts, row))
        reason = reason_of(error)
        raise UserError(f"{where}: row {row} is not text ({reason}); write it in UTF-8") from error
    return names


def check_ids(ids: np.ndarray, where: str) -> None:
    """Checks that the ids of a split, str [N], are valid text, and that none names two patches.

    Raises:
        UserError: an id is not valid text, or comes twice.
    """
    names = check_texts(ids, where)
    if len(set(names)) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise UserError(f"{where}: {name[:100]} names {times} patches; give each patch its own id")


def _is_text(ids: np.ndarray, row: int) -> bool:
    try:
        str(ids[row]).encode()
    except (ValueError, SystemError):
        return False
    return True
