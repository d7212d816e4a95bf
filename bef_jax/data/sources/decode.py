"""Decodes the pictures that a source lists into chunks, with a thread for each core."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from bef_jax.data import pictures
from bef_jax.data.chunk import CHUNK_SIZE, Begin, Chunk, Contents, counted, silent
from bef_jax.data.patch import READ_ORDER, label_dtype, same_scale
from bef_jax.errors import UserError
from bef_jax.runtime.devices import cores

_BLOCK = 16  # pictures that a thread decodes before it looks for more work
# The most bytes of a chunk's pixels, and of its undecoded pictures except one. Two chunks are in
# memory at once.
_CHUNK_BYTES = 64 << 20
# The most pixels of one picture, 4096 x 4096. Each thread may decode one, at 7 bytes for each.
_LIMIT = 1 << 24


class Listed(NamedTuple):
    """A picture that a source lists.

    Attributes:
        path: of its file; with `content`, only its name in errors.
        label: number of its class.
        id: unique within its split.
        group: what patches of one slide or patient share; None if that is not known.
        content: the bytes of the picture, if it is not in a file of its own.
    """

    path: str
    label: int
    id: str
    group: str | None = None
    content: bytes | None = None


class Form(NamedTuple):
    """What every picture of a set must be, or is made into.

    Attributes:
        side: of the patches, in pixels.
        resize: none, side or mpp; see config.data.resize.
        mpp: micrometres per pixel of the patches; None if neither config nor pictures say it.
        first: name of the first picture, for errors about others that differ from it.
    """

    side: int
    resize: str
    mpp: float | None
    first: str


def open_listed(
    data: ConfigDict,
    splits: Mapping[str, Sequence[Listed]],
    classes: tuple[str, ...],
    begin: Begin = silent,
) -> Contents:
    """Returns what a source holds whose pictures are all listed.

    Args:
        data: config.data.
        splits: the pictures of each split that is there, in the order of reading.
        classes: names of the classes, in the order of their labels.
        begin: see `sources.open_source`.

    Raises:
        UserError: there is no picture, or the first one is refused by its header.
    """
    rows = {split: splits[split] for split in READ_ORDER if split in splits}
    form = form_of(data, next(itertools.chain.from_iterable(rows.values())))
    chunks = (
        read_listed(split, rows[split], len(rows[split]), form, len(classes), begin)
        for split in rows
    )
    return Contents(itertools.chain.from_iterable(chunks), classes, form.mpp)


def form_of(data: ConfigDict, first: Listed) -> Form:
    """Returns what every picture must be, by `config.data` and the header of the first one.

    If `data.mpp` is 0, the first picture's scale counts for all.

    Raises:
        UserError: the first picture cannot be read, or is refused; see `read_listed`.
    """
    if data.resize == "mpp" and not data.mpp:
        raise UserError(
            "config.data.mpp is 0, but config.data.resize=mpp needs it; set the micrometres per "
            "pixel that the patches shall have"
        )
    form = Form(data.patch_size, data.resize, data.mpp or None, first.path)
    header = pictures.look(first.path, lambda path, found: None, first.content)
    if not form.mpp:
        form = form._replace(mpp=_patch_mpp(header, form))
    _check(first.path, header, form)
    return form


def read_listed(
    split: str,
    rows: Iterable[Listed],
    count: int,
    form: Form,
    classes: int,
    begin: Begin = silent,
) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of the listed pictures, in their order.

    Threads decode at most two chunks ahead of the caller; so many rows are also taken from `rows`.
    The threads end when the generator is exhausted or closed.

    Args:
        split: train, valid or test.
        rows: the pictures; either all or none have a group.
        count: how many there are, to show the progress.
        form: see `form_of`.
        classes: how many classes there are.
        begin: see `sources.open_source`.

    Raises:
        UserError: a picture cannot be read, or its size or scale is refused.
    """
    yield from counted(split, _chunks(iter(rows), form, label_dtype(classes)), count, begin)


def _chunks(rows: Iterator[Listed], form: Form, dtype: np.dtype) -> Iterator[Chunk]:
    size = max(1, min(CHUNK_SIZE, _CHUNK_BYTES // (form.side**2 * 3)))
    pool = ThreadPoolExecutor(cores(), "decode")
    try:
        started: deque[tuple[list[Listed], np.ndarray, list[Future]]] = deque()
        while batch := _next_rows(rows, size):
            images = np.empty((len(batch), form.side, form.side, 3), np.uint8)
            blocks = [slice(start, start + _BLOCK) for start in range(0, len(batch), _BLOCK)]
            futures = [pool.submit(_decode, batch[each], images[each], form) for each in blocks]
            started.append((batch, images, futures))
            if len(started) > 1:
                yield _finished(*started[0], dtype)
                started.popleft()
        while started:
            yield _finished(*started[0], dtype)
            started.popleft()
    finally:
        for _, _, futures in started:
            for future in futures:
                future.cancel()
        # Threads finish the blocks that they are at, so that none outlives the caller.
        pool.shutdown()


def _next_rows(rows: Iterator[Listed], count: int) -> list[Listed]:
    """Returns the next `count` rows, or fewer if these hold many bytes."""
    batch, held = [], 0
    while len(batch) < count and held < _CHUNK_BYTES and (row := next(rows, None)):
        batch.append(row)
        held += len(row.content or b"")
    return batch


def _finished(
    batch: list[Listed], images: np.ndarray, futures: list[Future], dtype: np.dtype
) -> Chunk:
    for future in futures:
        future.result()  # raises the error of the first picture that has one
    groups = None if batch[0].group is None else np.asarray([row.group for row in batch])
    labels = np.asarray([row.label for row in batch], dtype)
    return Chunk(images, labels, np.asarray([row.id for row in batch]), groups)


def _decode(rows: list[Listed], images: np.ndarray, form: Form) -> None:
    """Decodes the pictures into `images`, uint8 [n, S, S, 3]."""
    for row, image in zip(rows, images, strict=True):
        image[:] = _patch(row, form)


def _patch(row: Listed, form: Form) -> np.ndarray:
    """Returns the pixels of a picture as a patch, uint8 [S, S, 3]."""
    headers = []

    def check(path: str, header: pictures.Header) -> None:
        _check(path, header, form)
        headers.append(header)

    pixels = pictures.read(row.path, check, row.content)
    if form.resize == "none":
        return pixels
    return _resampled(pixels, headers[0].mpp, form)


# ---- size and scale -----------------------------------------------------------------------------


def _check(path: str, header: pictures.Header, form: Form) -> None:
    """Raises UserError unless a picture has the size and the scale, or can be brought to them."""
    height, width = header.height, header.width
    size = f"{width}x{height} pixels"
    if height * width > _LIMIT:
        raise UserError(f"{path}: {size} are above {_LIMIT:,}; cut it into parts")
    if form.resize == "none" and (height, width) != (form.side, form.side):
        raise UserError(f"{path}: {size}, {_size_fix(path, header, form)}")
    if form.resize == "side" and height != width:
        raise UserError(f"{path}: {size}; config.data.resize=side needs squares, so cut it to one")
    if form.resize == "mpp":
        _check_cut(path, header, form)
    elif (mpp := _patch_mpp(header, form)) and not (form.mpp and same_scale(mpp, form.mpp)):
        raise UserError(f"{path}: says {mpp:.4g} um per pixel, {_scale_fix(form)}")


def _size_fix(path: str, header: pictures.Header, form: Form) -> str:
    if path != form.first:
        return (
            f"unlike {form.first}, which has the {form.side}x{form.side} of config.data.patch_size;"
            " cut it to that size, or set config.data.resize"
        )
    is_square = header.height == header.width
    fix = f"set it to {header.width}" if is_square else f"cut them to {form.side}x{form.side}"
    return f"but config.data.patch_size is {form.side}; {fix}, or set config.data.resize"


def _scale_fix(form: Form) -> str:
    if form.mpp:
        return f"but the set has {form.mpp:.4g}; resample it, or set config.data.resize=mpp"
    return f"but {form.first} says none; set config.data.mpp to the scale of all"


def _patch_mpp(header: pictures.Header, form: Form) -> float | None:
    """Returns the um per pixel that the picture has as a patch, if it says its scale."""
    if not header.mpp or form.resize != "side":
        return header.mpp
    return header.mpp * header.height / form.side


def _check_cut(path: str, header: pictures.Header, form: Form) -> None:
    if not header.mpp:
        raise UserError(
            f"{path}: does not say its um per pixel, which config.data.resize=mpp needs; "
            "write it into TIFF files, or set config.data.resize=side"
        )
    height, width = (round(side * header.mpp / form.mpp) for side in (header.height, header.width))
    if min(height, width) < form.side:
        raise UserError(
            f"{path}: {width}x{height} pixels after resampling to {form.mpp:.4g} um per pixel, "
            f"below config.data.patch_size={form.side}; leave it out, or set a smaller patch_size"
        )


def _resampled(pixels: np.ndarray, mpp: float | None, form: Form) -> np.ndarray:
    """Returns the picture, uint8 [H, W, 3], as a patch, uint8 [S, S, 3].

    Pillow's bicubic filter widens with the reduction, so that nothing is aliased. Lanczos would
    draw lighter rims around dark nuclei.
    """
    size, box = (form.side, form.side), None
    if form.resize == "mpp":
        # Resample only the middle, because all of a picture could grow to any size.
        top, bottom = _middle(pixels.shape[0], mpp / form.mpp, form.side)
        left, right = _middle(pixels.shape[1], mpp / form.mpp, form.side)
        box = (left, top, right, bottom)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box))


def _middle(length: int, ratio: float, side: int) -> tuple[float, float]:
    """Returns where the middle `side` pixels of a resampled picture begin and end before that.

    Args:
        length: of the picture's height or width, in pixels.
        ratio: of its length after resampling to that before.
        side: in pixels after resampling, at most round(length * ratio).
    """
    start = (round(length * ratio) - side) // 2 / ratio
    return start, min(start + side / ratio, length)  # rounding can lead past the end
