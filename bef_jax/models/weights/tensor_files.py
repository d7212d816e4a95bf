"""Reads files of tensors: .safetensors, and both formats of torch's .pth.

Such a file says for each tensor which type and shape it has, and where its numbers are. A tensor
becomes an array that shows the file, which is mapped into memory. Until a caller converts it, its
numbers are not read and it takes no memory, however large it claims to be. NumPy refuses an array
that would reach beyond the bytes of the file.

This module reads .pth files without torch, because torch creates what a file asks for before
anybody can check it: an inflated entry, a dense copy of a sparse tensor, or a `bytearray` of any
length.
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file

# The most bytes of a description of tensors; EfficientNet-B7's takes 0.2 MB. Python's objects of it
# can take a hundred times as much memory.
_MAX_DESCRIPTION_BYTES = 4 << 20
_AXES = 64  # NumPy's limit; a pickle can give one long list as the shape of many tensors
_SHOWN = 80  # characters of a name
_TRUNCATED = "it was cut, or is damaged; fetch or save it again"
_NO_STATE = "it holds no dict of tensors; save only the network's state_dict()"
_OTHER_PROGRAM = "another program wrote it; give a file that torch.save or safetensors wrote"
# Each type has a name of torch's storage, a name of safetensors, and NumPy's own type.
_TYPES = (
    ("DoubleStorage", "F64", np.float64),
    ("FloatStorage", "F32", np.float32),
    ("HalfStorage", "F16", np.float16),
    ("BFloat16Storage", "BF16", jnp.bfloat16),
    ("LongStorage", "I64", np.int64),
    ("IntStorage", "I32", np.int32),
    ("ShortStorage", "I16", np.int16),
    ("CharStorage", "I8", np.int8),
    ("ByteStorage", "U8", np.uint8),
    ("BoolStorage", "BOOL", np.bool_),
)
# Damaged content raises these here, in NumPy, and in Python's readers of JSON, pickles and zips.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_DAMAGE += (EOFError, NotImplementedError, pickle.PickleError, struct.error, zipfile.BadZipFile)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by name, as arrays of any type that show the file.

    The content decides the format; the suffix does not matter.

    Raises:
        UserError: it is not a regular file, is damaged, or holds anything except a dict of tensors.
    """
    try:
        with _Bounded(open_user_file(path).detach()) as stream:
            content = np.memmap(stream, np.uint8, "r")
            return _reader_of(content)(content, stream)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)})") from error
    except _DAMAGE as error:
        why = shortened(reason_of(error), 200)
        why = why if isinstance(error, _Refused) else f"damaged ({why}); fetch or save it again"
        raise UserError(f"{path} is not a file that holds only tensors: {why}") from error


def shortened(text: str, most: int = _SHOWN) -> str:
    """Returns `text`, cut if it is too long for a line, because strangers choose tensors' names."""
    return text if len(text) <= most else f"{text[:most]}..."


class _Refused(ValueError):
    """An error whose text says what is wrong with a file, and how to fix it."""


class _Bounded(io.BufferedReader):
    """A file that refuses to read too much at once, such as a zip's long directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DESCRIPTION_BYTES:
            raise _Refused("its directory is too long; save only the network's state_dict()")
        return super().read(size)


def _reader_of(content: np.ndarray) -> Callable[[np.ndarray, _Bounded], dict[str, np.ndarray]]:
    start = content[:9].tobytes()
    if start[8:] == b"{":
        return _read_safetensors
    if start.startswith(b"PK"):
        return _read_zip
    if start.startswith(pickle.PROTO):
        return _read_legacy
    raise _Refused(_OTHER_PROGRAM)


# ---- safetensors --------------------------------------------------------------------------------


def _read_safetensors(content: np.ndarray, stream: _Bounded) -> dict[str, np.ndarray]:
    del stream
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > _MAX_DESCRIPTION_BYTES:
        raise _Refused("its header is too long; save only the network's tensors")
    header, data = json.loads(content[8 : 8 + length].tobytes()), content[8 + length :]
    return {key: _entry(data, **entry) for key, entry in header.items() if key != "__metadata__"}


def _entry(data: np.ndarray, dtype: str, shape: list, data_offsets: list) -> np.ndarray:
    known = {name: kind for _, name, kind in _TYPES}
    if dtype not in known:
        raise _Refused(f"it holds a tensor of type {dtype}; save it as F32")
    start, end = data_offsets
    if not 0 <= start <= end <= len(data):
        raise _Refused(_TRUNCATED)
    tensor = np.ndarray(shape, known[dtype], data[start:end])
    if tensor.nbytes != end - start:
        raise _Refused("its header is damaged; fetch or save it again")
    return tensor


# ---- torch --------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    """The description of a tensor; offset, shape and strides count numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _read_zip(content: np.ndarray, stream: _Bounded) -> dict[str, np.ndarray]:
    """Reads torch's present format: entries NAME/data.pkl, NAME/byteorder and NAME/data/KEY."""
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: _stored(content, entry) for entry in archive.infolist()}
    pickled = next((name for name in entries if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise _Refused(_OTHER_PROGRAM)
    if len(entries[pickled]) > _MAX_DESCRIPTION_BYTES:
        raise _Refused("its description is too long; save only the network's state_dict()")
    folder = pickled.removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    _check_byte_order(order is None or order[:9].tobytes() == b"little")
    loaded = _Description(io.BytesIO(entries[pickled].tobytes())).load()
    data = f"{folder}data/"
    return _views(loaded, {name.removeprefix(data): entry for name, entry in entries.items()})


def _stored(content: np.ndarray, entry: zipfile.ZipInfo) -> np.ndarray:
    """Returns the bytes of a zip's entry."""
    # torch never compresses, and a compressed entry can unpack to a thousand times the file's size.
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise _Refused(f"{shortened(entry.filename)} is compressed; save it with torch.save")
    # 30 bytes, a name and an extra field come before the content. The last four of the 30 bytes are
    # the lengths of the name and the extra field.
    start = entry.header_offset
    sign, name, extra = struct.unpack("<4s22x2H", content[start : start + 30].tobytes())
    if sign != zipfile.stringFileHeader:
        raise _Refused(_TRUNCATED)
    start += 30 + name + extra
    return content[start : start + entry.file_size]


def _read_legacy(content: np.ndarray, stream: _Bounded) -> dict[str, np.ndarray]:
    """Reads the format of torch before 1.6: five pickles, then each storage after its length."""
    del stream
    head = io.BytesIO(content[:_MAX_DESCRIPTION_BYTES].tobytes())
    magic, _, system = (_Description(head).load() for _ in range(3))
    if magic != 0x1950A86A20F9469CFC6C:
        raise _Refused(_OTHER_PROGRAM)
    _check_byte_order(system["little_endian"])
    description = _Description(head)
    loaded, keys = description.load(), _Description(head).load()
    data, start = {}, head.tell()
    for key in keys:
        storage = description.storages[_checked_name(key)]
        end = start + 8 + storage.count * storage.dtype.itemsize
        data[key], start = content[start + 8 : end], end
    return _views(loaded, data)


def _check_byte_order(little: bool) -> None:
    if not little:
        raise _Refused("it was saved on a big-endian machine; save it on another")


def _views(loaded: Any, data: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict, which training scripts may nest in another dict."""
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not state:
        raise _Refused(_NO_STATE)
    return {str(key): _view(tensor, data) for key, tensor in state.items()}


def _view(tensor: Any, data: Mapping[str, np.ndarray]) -> np.ndarray:
    if not isinstance(tensor, _Tensor):
        raise _Refused(_NO_STATE)
    key, dtype, count = tensor.storage
    if len(data[key]) != count * dtype.itemsize:
        raise _Refused(_TRUNCATED)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.ndarray(tensor.shape, dtype, data[key], tensor.offset * dtype.itemsize, strides)


class _DictByName(dict):
    """A dict whose keys must be names, which `_checked_name` checks."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_checked_name(key), value)


def _checked_name(key: Any) -> str | int:
    """Returns `key`, which must be text or an integer.

    A tuple can hold another one twice, and so on for many levels, so that it takes years to hash or
    print.
    """
    if not isinstance(key, str | int):
        raise _Refused("it has a name that is not text; save only state_dict()")
    return key


def _numbers(*values: Any) -> tuple[int, ...]:
    if len(values) > _AXES or not all(isinstance(value, int) for value in values):
        raise _Refused("it has a size that is not a number; save only state_dict()")
    return values


# The opcodes that torch writes under Python 2 and 3, in pickles of protocol 2.
_OPCODES = [
    ord(getattr(pickle, name))
    for name in (
        "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT",
        "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
        "LONG1", "BINFLOAT", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE",
        "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM",
        "SETITEMS",
    )
]  # fmt: skip


# Use the unpickler written in Python, because the one in C makes a table as long as the largest
# memo number.
class _Description(pickle._Unpickler):
    """Reads torch's description of tensors: dicts and lists of tensors, text and numbers.

    Everything else that a pickle names is refused. So nothing in the pickle runs, and no object is
    larger than its description.

    Attributes:
        storages: those that hold the numbers of the tensors, by key.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}
        # Bound methods, because a pickle can't change them or the objects that they belong to.
        self._known = {
            "collections OrderedDict": self._ordered_dict,
            "torch._utils _rebuild_tensor": self._tensor,
            "torch._utils _rebuild_tensor_v2": self._tensor,
            "torch._utils _rebuild_parameter": self._parameter,
            "torch._utils _rebuild_parameter_with_state": self._parameter,
        } | {f"torch {name}": np.dtype(kind) for name, _, kind in _TYPES}

    def find_class(self, module: str, name: str, /) -> Any:
        known = self._known.get(f"{module} {name}")
        if known is None:
            raise _Refused(f"it holds {module}.{name}; save only state_dict()")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, count, *view = pid
        if not isinstance(dtype, np.dtype) or view not in ([], [None]):
            raise _Refused("it holds numbers of an unknown kind; save only state_dict()")
        self.storages[_checked_name(key)] = _Storage(key, dtype, *_numbers(count))
        return self.storages[key]

    def _ordered_dict(self, pairs: list | None = None) -> _DictByName:
        named = _DictByName()
        if pairs:  # Python 2 wrote it this way
            for key, value in pairs:
                named[key] = value
            pairs.clear()  # otherwise a short file could make many long dicts of one list
        return named

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple, strides: tuple,
        requires_grad: bool = False, hooks: Any = None, metadata: Any = None,
    ) -> _Tensor:  # fmt: skip
        if not isinstance(storage, _Storage):
            raise _Refused("it holds a tensor without numbers; save only state_dict()")
        return _Tensor(storage, *_numbers(offset), _numbers(*shape), _numbers(*strides))

    def _parameter(
        self, tensor: _Tensor, requires_grad: bool, hooks: Any, state: Any = None
    ) -> _Tensor:
        return tensor

    def _drop_build_state(self) -> None:
        self.stack.pop()  # extra state, such as the layers' versions in a state dict

    def _empty_dict(self) -> None:
        self.append(_DictByName())

    def _refuse(self) -> NoReturn:
        raise _Refused(_OTHER_PROGRAM)

    dispatch = dict.fromkeys(range(256), _refuse)
    dispatch |= {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}
    dispatch |= {ord(pickle.BUILD): _drop_build_state, ord(pickle.EMPTY_DICT): _empty_dict}
