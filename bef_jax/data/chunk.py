"""The unit that every source yields, and the checks that every source makes."""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bef_jax.data.patch import IMAGE_SHAPE
from bef_jax.errors import UserError, reason_of

CHUNK_SIZE = 512  # patches, 13.5 MiB: bounds the memory of reading
READ_ORDER = ("test", "valid", "train")  # a patch in two splits is dropped from the later one
_LONGEST_ID = 1024  # characters
_SMALL_IDS = 256 << 20  # bytes of ids in memory, which every file may have

# begin(name, total, unit) announces a long piece of work. What it returns is called with how much
# more of it is done. The unit is "patches" or "bytes".
Begin = Callable[[str, int, str], Callable[[int], object]]


def silent(name: str, total: int, unit: str) -> Callable[[int], object]:
    """Begins work that nobody watches."""
    del name, total, unit
    return lambda _: None


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


def counted(
    split: str, chunks: Iterable[Chunk], total: int, begin: Begin
) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk), and tells how many of the `total` patches are through."""
    advance = begin(f"reading {split}", total, "patches")
    for chunk in chunks:
        yield split, chunk
        # After the yield: by now the chunk is written.
        advance(len(chunk.labels))


def short_name(file_name: str) -> str:
    """Returns the name of one of PCam's files without what all of them begin with."""
    return file_name.removeprefix("camelyonpatch_level_2_")


@contextlib.contextmanager
def readable(path: Path, fix: str) -> Iterator[None]:
    """Turns what a library says about a damaged file into a UserError.

    Args:
        path: of the file, or the folder of the files, that the body reads.
        fix: what a user does about it; ends the error.
    """
    try:
        yield
    except UserError:
        raise
    # zipfile, HDF5, TFDS and NumPy's parser of headers raise errors of any kind, by where in the
    # file the damage is.
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); {fix}") from error


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
        # An array of text is as wide as its longest, in every row.
        if len(longest := max(ids, key=len)) > _LONGEST_ID:
            raise UserError(f"{longest[:100]}: an id of more than {_LONGEST_ID} characters")
        yield Chunk(np.stack(images), np.asarray(labels, np.uint8), np.asarray(ids, str))


def numbered(prefix: str, rows: slice) -> np.ndarray:
    """Returns ids for rows that have none of their own: <prefix>_<row>."""
    return np.asarray([f"{prefix}_{row}" for row in range(rows.start, rows.stop)])


# ---- what an array declares, looked at before it is read -----------------------------------------


def describe(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """Returns dtype and shape in a few words: a file can declare a thousand axes or fields."""
    return f"{dtype} {list(shape)}"[:100]


def check_images(shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
    """Checks that an array holds patches: uint8 [N, 96, 96, 3] with N > 0.

    Raises:
        UserError: another shape or dtype, or no patch at all; names `where`.
    """
    # What is there must be pixels as scanned: scaling floats or resampling would be a guess.
    if len(shape) != 4 or tuple(shape[1:]) != IMAGE_SHAPE or dtype != np.uint8:
        raise UserError(
            f"{where}: images must be uint8 [N, 96, 96, 3], not {describe(shape, dtype)}; "
            "cut or resample them to 96x96 RGB first"
        )
    if shape[0] <= 0:
        raise UserError(f"{where}: holds no patch; fetch or write the file again")


def check_label_array(shape: tuple[int, ...], dtype: np.dtype, count: int, where: str) -> None:
    """Checks that an array has a number for each of `count` images: [N] or PCam's [N, 1, 1, 1].

    Raises:
        UserError: another shape, or values that are no real numbers; names `where`.
    """
    # The first axis, too: [1, N] has as many entries, and means something else.
    if math.prod(shape) != count or tuple(shape[:1]) != (count,):
        raise UserError(
            f"{where}: {math.prod(shape)} labels for {count} images; "
            "each image needs exactly one label"
        )
    # A text of a gigabyte for each image would be read before it turns out to be no label.
    if dtype.kind not in "biuf":
        raise UserError(
            f"{where}: {describe(shape, dtype)}; labels must be numbers, 0 (normal) or 1 (tumour)"
        )


def check_id_array(
    shape: tuple[int, ...], dtype: np.dtype, count: int, held: int, where: str
) -> None:
    """Checks that an array has a text (or a number) for each of `count` images.

    Args:
        held: bytes of the file, or of the images: ids may take an eighth of that, or 256 MiB.

    Raises:
        UserError: another shape, other values, or texts that are too long; names `where`.
    """
    letters = {"U": dtype.itemsize // 4, "S": dtype.itemsize}.get(dtype.kind, 32)
    if tuple(shape) != (count,) or dtype.kind not in "SUbiuf" or letters > _LONGEST_ID:
        raise UserError(
            f"{where}: {describe(shape, dtype)} for {count} images; write one short text for each"
        )
    # In memory each id is as long as the longest, and each character takes four bytes.
    if count * letters * 4 > max(_SMALL_IDS, held // 8):
        raise UserError(f"{where}: {count} ids of {letters} characters; write shorter ones")


# ---- what an array holds ------------------------------------------------------------------------


def check_labels(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Returns `labels` (any real dtype; [N] or PCam's [N, 1, 1, 1]) as uint8 [N].

    Raises:
        UserError: not one label for each of the `count` images, or one outside {0, 1}.
    """
    check_label_array(labels.shape, labels.dtype, count, where)
    flat = labels.reshape(-1)
    # Before the cast, which would turn 0.5 and NaN into a 0.
    wrong = np.flatnonzero(~np.isin(flat, (0, 1)))
    if wrong.size:
        raise UserError(
            f"{where}: label {flat[wrong[0]]} in row {wrong[0]}; "
            "labels must be 0 (normal) or 1 (tumour)"
        )
    return flat.astype(np.uint8)


def check_ids(ids: np.ndarray, where: str) -> None:
    """Checks that the ids of a split, str [N], are text, and that none names two patches.

    Raises:
        UserError: an id that UTF-8 cannot hold, since it would end a run when it is written; or one
            that comes twice.
    """
    try:
        names = ids.tolist()
        "".join(names).encode()
    except (ValueError, SystemError) as error:  # the latter of a number that is no character
        row = next(row for row in range(len(ids)) if not _is_text(ids, row))
        reason = reason_of(error)
        raise UserError(f"{where}: row {row} is no text ({reason}); write ids of UTF-8") from error
    if len(set(names)) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise UserError(f"{where}: {name[:100]} names {times} patches; give each an id of its own")


def _is_text(ids: np.ndarray, row: int) -> bool:
    try:
        str(ids[row]).encode()
    except (ValueError, SystemError):
        return False
    return True
