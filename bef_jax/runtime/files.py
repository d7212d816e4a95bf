"""Files on disk: users' files are opened here, and ours are read, checked and replaced here.

A file that is read must be a regular one: opening a FIFO waits for a writer, and a device such as
/dev/zero has no end. A file that is written appears whole, under its name, or not at all.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from bef_jax.errors import UserError, reason_of

# Of a JSON file of ours. What Python makes of it can take twenty times as much memory.
_LONGEST_JSON = 32 << 20
_PROBE = bytes(1 << 16)  # a full disk still makes empty files
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# What damaged content raises while it is parsed, looked up in and compared.
_DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)
_DAMAGE += (RecursionError,)  # brackets by the thousand


# ---- what users name ----------------------------------------------------------------------------


def user_path(given: str | os.PathLike) -> Path:
    """Returns the path that a user means; `~` is their home. It need not be there.

    Raises:
        UserError: no file can have that name: links that end nowhere, a name that is too long, the
            home of an unknown user.
    """
    try:
        path = Path(given).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{given}: can be no path ({reason_of(error)})") from error
    return path


def check_regular(file: Path) -> None:
    """Raises `UserError` where `file`, or what it links to, is there and is no regular file."""
    try:
        kind = stat.S_IFMT(os.stat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason_of(error)})") from error
    if kind != stat.S_IFREG:
        raise UserError(f"{file}: is {_KINDS.get(kind, 'no file')}; name a regular file")


def open_user_file(file: Path) -> BinaryIO:
    """Opens a file for reading, as bytes; every file that is not ours is opened here.

    Raises:
        UserError: it is no regular file.
        OSError: it is not there, or may not be read.
    """
    check_regular(file)
    return open(file, "rb")


# ---- what the program wrote itself --------------------------------------------------------------


def read_json(file: Path, check: Callable[[Any], object], fix: str) -> Any:
    """Reads a JSON file that this program wrote, and lets `check` look at what it holds.

    Args:
        check: raises ValueError, KeyError, TypeError or the like where the content has another
            shape, or other types. Whoever gets the content need not look again.
        fix: what a user does about a damaged file; ends the error.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is no regular file, was cut or edited, or is of another version.
    """
    try:
        with open_user_file(file) as stream:
            content = stream.read(_LONGEST_JSON + 1)
        if len(content) > _LONGEST_JSON:
            raise ValueError("it is longer than any that is written")
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
        types: by key, a type or several, as `dict | None`. An int passes for a float, a bool for no
            number.
    """
    if not isinstance(content, dict):
        raise TypeError(f"{type(content).__name__}, where a dict is meant")
    for key, wanted in types.items():
        value = content[key]
        taken = int | float if wanted is float else wanted
        if not isinstance(value, taken) or (isinstance(value, bool) and wanted is not bool):
            raise TypeError(f"{key} is {type(value).__name__}")


@contextlib.contextmanager
def replacing(file: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Gives a new file, opened to be written, which takes the place of `file` in the end.

    Where the body raises, `file` stays as it was, and the new one is removed.

    Args:
        mode: `wb` or `w`.
        options: of `open`, such as encoding.
    """
    # In the same folder, since a rename is atomic on one file system only.
    temporary = _temporary_name(file.parent)
    try:
        # "x": of several processes, or threads, each writes its own.
        with open(temporary, mode.replace("w", "x"), **options) as stream:
            yield stream
        # No fsync: it guards against a power cut, not against a kill.
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes) -> None:
    """Writes `content` to `file`, whole or not at all."""
    with replacing(file) as stream:
        stream.write(content)


def write_text(file: Path, text: str) -> None:
    """Writes `text` to `file` as UTF-8, whole or not at all; what is no text is escaped."""
    write_bytes(file, text.encode(errors="backslashreplace"))


def write_json(file: Path, content: dict | list) -> None:
    """Writes `content` to `file`, whole or not at all."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def check_outputs(
    folder: Path,
    files: Iterable[str] = (),
    folders: Iterable[str] = (),
    fix: str = "give another --workdir",
) -> None:
    """Looks whether outputs can be written, before the work that makes them; changes nothing.

    Args:
        folder: of the outputs; it need not be there yet.
        files: names in it that will be written or replaced.
        folders: names in it of folders that will be written to.
        fix: what a user does about it; ends the error.

    Raises:
        UserError: something else has one of the names, or nothing can be written there.
    """
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{folder}: is no folder; {fix}")
        for name in files:
            if os.path.lexists(folder / name) and not _is_replaceable(folder / name):
                raise UserError(f"{folder / name}: a file is to be written there; move it away")
        for name in folders:
            if os.path.lexists(folder / name) and not (folder / name).is_dir():
                raise UserError(f"{folder / name}: a folder is to be there; move it away")
        _probe(folder)
        for name in folders:
            _probe(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason_of(error)}); {fix}") from error


def _is_replaceable(file: Path) -> bool:
    """Whether it is a regular file, or a link to one, or a link to nothing."""
    return file.is_file() or (file.is_symlink() and not file.exists())


def _probe(folder: Path) -> None:
    """Writes some bytes into the folder, or where it will be made, and removes them again."""
    place = next(each for each in (folder, *folder.parents) if each.exists())
    for name in folder.relative_to(place).parts:
        # Where its folder is not there yet, no name is found to be too long.
        with contextlib.suppress(FileNotFoundError):
            (place / name).stat()
    temporary = _temporary_name(place)
    try:
        with open(temporary, "xb") as stream:
            stream.write(_PROBE)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name(folder: Path) -> Path:
    # Hidden, so that whoever lists results does not meet it. Short, as `file` may have the longest
    # name that there can be.
    return folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"


# ---- checksums ---------------------------------------------------------------------------------

_BLOCK = 1 << 20


def sha256(file: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """Returns the sha256 of a file's content, as hex digits; the file is streamed.

    Args:
        file: a regular file.
        advance: called with the number of bytes of each block that was read.
    """
    digest = hashlib.sha256()
    with open_user_file(file) as stream:
        # No more than it has: a link can lead to a file of the system that has no end.
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
    """Returns the first file, by name, that is missing or has another content, or None.

    Args:
        folder: where the files lie; what a name leads to outside of it counts as missing.
        expected: sha256 by the file's path in `folder`, with forward slashes.
        advance: as for `sha256`.
    """
    # Sorted, so that every try names the same file; those after it are not read.
    for name in sorted(expected):
        file = folder / name
        is_there = _is_inside(name) and os.path.isfile(file)
        if not is_there or sha256(file, advance) != expected[name]:
            return file
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
