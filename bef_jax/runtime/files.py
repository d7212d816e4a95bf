"""Files on disk: opens users' files, reads and checks JSON, and replaces the program's own files.

A file to read must be a regular one, because opening a FIFO waits for a writer, and a device such
as /dev/zero has no end. A written file appears whole, under its name, or not at all.
"""

import contextlib
import gzip
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from bef_jax.errors import UserError, reason_of

_LONGEST_JSON_MIB = 32  # the Python objects of a JSON file can take twenty times as much memory
_PROBE = bytes(1 << 16)  # not empty, because a full disk can still make empty files
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Damaged content raises these while it is parsed, searched and compared.
_DAMAGE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,  # thousands of nested brackets
)


# ---- the files of users -------------------------------------------------------------------------


def user_path(given: str | os.PathLike) -> Path:
    """Returns the path that a user means; `~` is their home. It need not exist.

    Raises:
        UserError: it cannot be looked at: a loop of links, a name that is too long, the home of an
            unknown user, or a folder that may not be read.
    """
    try:
        path = Path(given).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{given}: cannot be a path ({reason_of(error)})") from error
    return path


def check_regular(file: Path) -> None:
    """Raises `UserError` if `file`, or what it links to, exists and is not a regular file."""
    try:
        kind = stat.S_IFMT(os.stat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason_of(error)})") from error
    if kind != stat.S_IFREG:
        raise UserError(f"{file}: is {_KINDS.get(kind, 'not a file')}; name a regular file")


def open_user_file(file: Path) -> BinaryIO:
    """Opens a user's file to read bytes. Where a library opens it, use `check_regular` before.

    Raises:
        UserError: it is not a regular file.
        OSError: it does not exist, or may not be read.
    """
    check_regular(file)
    return open(file, "rb")


# ---- JSON, and the files of the program itself --------------------------------------------------


def read_json(file: Path, check: Callable[[Any], object], fix: str) -> Any:
    """Reads a JSON file of this program or of timm, and calls `check` with its content.

    Args:
        check: raises ValueError, KeyError, TypeError or the like if the content has another shape
            or other types. The caller need not check it again.
        fix: what a user can do about a damaged file; it becomes the end of the error.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is not a regular file, is too long, was cut or edited, or is of
            another version.
    """
    try:
        with open_user_file(file) as stream:
            content = stream.read((_LONGEST_JSON_MIB << 20) + 1)
        if len(content) > _LONGEST_JSON_MIB << 20:
            raise ValueError(f"it is longer than {_LONGEST_JSON_MIB} MiB")
        found = json.loads(content)
        check(found)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(file) from error
    except UserError:
        raise
    except (OSError, *_DAMAGE) as error:
        why = f"no {error}" if isinstance(error, KeyError) else reason_of(error)
        raise UserError(f"{file}: damaged ({why}); {fix}") from error
    return found


def check_types(content: Any, /, **types: Any) -> None:
    """Raises TypeError or KeyError unless `content` is a dict with values of these types.

    Args:
        types: for each key, a type or several, such as `dict | None`. A plain `float` also accepts
            an int. Only a plain `bool` accepts a bool.
    """
    if not isinstance(content, dict):
        raise TypeError(f"{type(content).__name__} where a dict is expected")
    for key, wanted in types.items():
        value = content[key]
        taken = int | float if wanted is float else wanted
        if not isinstance(value, taken) or (isinstance(value, bool) and wanted is not bool):
            raise TypeError(f"{key} is {type(value).__name__}")


@contextlib.contextmanager
def replacing(file: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Yields a new file, open for writing, which replaces `file` at the end.

    If the body raises, `file` stays as it was, and the new one is removed.

    Args:
        mode: `wb` or `w`.
        options: for `open`, such as encoding.
    """
    # Use the same folder, because a rename is atomic only within one file system.
    temporary = _temporary_name(file.parent)
    try:
        # Mode "x" makes sure that each process or thread writes its own file.
        with open(temporary, mode.replace("w", "x"), **options) as stream:
            yield stream
        # fsync is left out, because it guards against a power cut, not against a kill.
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_gzip(file: Path, level: int) -> Iterator[BinaryIO]:
    """Yields what packs into a new file, which replaces `file` at the end, as `replacing` does.

    The same content gives the same bytes, because the file has no time and no name in it.

    Args:
        level: of gzip, 1 for the fastest to 9 for the smallest file.
    """
    with replacing(file) as raw, gzip.GzipFile("", "wb", level, raw, mtime=0) as out:
        yield out


def write_bytes(file: Path, content: bytes) -> None:
    """Writes `content` to `file`, whole or not at all."""
    with replacing(file) as stream:
        stream.write(content)


def write_text(file: Path, text: str) -> None:
    """Writes `text` to `file` as UTF-8, whole or not at all; escapes what UTF-8 cannot hold."""
    write_bytes(file, text.encode(errors="backslashreplace"))


def write_json(file: Path, content: dict | list) -> None:
    """Writes `content` to `file`, whole or not at all."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def check_outputs(
    folder: Path,
    output_files: Iterable[str] = (),
    output_folders: Iterable[str] = (),
    fix: str = "give another --workdir",
) -> None:
    """Checks that outputs can be written, before the work that makes them; leaves nothing behind.

    Args:
        folder: the folder of the outputs; it need not exist yet.
        output_files: names in it of files that will be written or replaced.
        output_folders: names in it of folders that will be written to.
        fix: what a user can do about a folder that cannot be written; the end of that error.

    Raises:
        UserError: something else has one of these names, or nothing can be written there.
    """
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{folder}: is not a folder; {fix}")
        for name in output_files:
            if os.path.lexists(folder / name) and not _is_replaceable(folder / name):
                raise UserError(f"{folder / name}: is in the way of an output file; move it away")
        for name in output_folders:
            if os.path.lexists(folder / name) and not (folder / name).is_dir():
                raise UserError(f"{folder / name}: is in the way of an output folder; move it away")
        _check_writable(folder)
        for name in output_folders:
            _check_writable(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason_of(error)}); {fix}") from error


def _is_replaceable(file: Path) -> bool:
    """Returns whether it is a regular file, a link to one, or a link to nothing."""
    return file.is_file() or (file.is_symlink() and not file.exists())


def _check_writable(folder: Path) -> None:
    """Writes some bytes to the folder, or where it will be made, and removes them again."""
    place = next(each for each in (folder, *folder.parents) if each.exists())
    _check_name_lengths(place, folder.relative_to(place).parts)
    temporary = _temporary_name(place)
    try:
        with open(temporary, "xb") as stream:
            stream.write(_PROBE)
    finally:
        temporary.unlink(missing_ok=True)


def _check_name_lengths(place: Path, names: Iterable[str]) -> None:
    """Raises OSError if a name is too long there; `place` is a folder that exists."""
    for name in names:
        # Look right below it, because stat finds a too long name only if its parent exists.
        with contextlib.suppress(FileNotFoundError):
            (place / name).stat()


def _temporary_name(folder: Path) -> Path:
    # The name is hidden, so that a list of results does not show it. It is short, because the file
    # that it stands for may have the longest possible name.
    return folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"


# ---- checksums ---------------------------------------------------------------------------------

_BLOCK = 1 << 20


def sha256(file: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """Returns the sha256 of a file's content as hex digits; it reads the file in blocks.

    Args:
        file: a regular file.
        advance: called with the number of bytes of each block that was read.
    """
    digest = hashlib.sha256()
    with open_user_file(file) as stream:
        # Read only as much as its size, because a link can lead to a system file without an end.
        left = os.fstat(stream.fileno()).st_size
        while block := stream.read(min(left, _BLOCK)):
            digest.update(block)
            advance(len(block))
            left -= len(block)
    return digest.hexdigest()


def first_damaged(
    folder: Path,
    expected: Mapping[str, str],
    advance: Callable[[int], object] = lambda _: None,
) -> Path | None:
    """Returns the first file, by name, that is missing or has other content; else None.

    Args:
        folder: where the files are; a name that leads outside of it counts as missing.
        expected: the sha256 of each file, by its path in `folder` with forward slashes.
        advance: as for `sha256`.
    """
    # Sort, so that every try names the same file. The files after it are not read.
    for name in sorted(expected):
        file = folder / name
        is_there = _is_inside(name) and os.path.isfile(file)
        if not is_there or sha256(file, advance) != expected[name]:
            return file
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
