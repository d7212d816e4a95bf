"""Finds the Parquet files of each split, on disk or on a hub of data sets."""

import re
from collections.abc import Sequence
from pathlib import Path

from bef_jax import hub
from bef_jax.data.sources.listing import SPLIT_NAMES
from bef_jax.errors import UserError
from bef_jax.runtime.files import check_regular, user_path

_PATTERNS = ("*.parquet", "*/*.parquet", "*/*/*.parquet")  # such as default/train/0000.parquet


def locate(where: str) -> Path:
    """Returns a file or folder: `where` itself, or the cached copy of the hub's hf:OWNER/NAME.

    Raises:
        UserError: the hub does not give it, see `hub.asking`; or the cached copy is damaged.
    """
    if not where.startswith(hub.PREFIX):
        return user_path(where)
    with hub.asking(where, instead="a folder of .parquet files") as (repository, revision):
        import huggingface_hub

        snapshot = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns="*.parquet"
        )
    files = sorted(Path(snapshot).rglob("*.parquet"))
    if not files:
        raise UserError(f"{where}: holds no .parquet file; name another data set")
    for file in files:
        hub.check_intact(where, file)
    return Path(snapshot)


def find(where: Path) -> dict[str | None, list[Path]]:
    """Returns the files of each split, sorted; all are of None if they name no split but train.

    The split is the first word of a file's name, as in train-00000-of-00004.parquet, or else the
    name of its folder.

    Raises:
        UserError: there are none, some say no split, or they belong to several data sets.
    """
    if not where.is_dir():
        if not where.exists():
            raise UserError(f"{where}: no such file; set config.data.dir to Parquet files")
        return {None: [where]}
    files = sorted(file for pattern in _PATTERNS for file in where.glob(pattern))
    files = [file for file in files if "/." not in f"/{file.relative_to(where).as_posix()}"]
    if not files:
        raise UserError(f"{where}: holds no .parquet file; set config.data.dir to its folder")
    _check(where, files)
    found: dict[str | None, list[Path]] = {}
    for file in files:
        found.setdefault(_split(where, file), []).append(file)
    if set(found) in ({None}, {"train"}):
        return {None: files}
    if None in found:
        raise UserError(
            f"{found[None][0]}: its name says no split, but those of other files do; "
            "begin it with train, valid or test"
        )
    return found


def _split(where: Path, file: Path) -> str | None:
    name = SPLIT_NAMES.get(re.match("[a-z]*", file.stem.lower())[0])
    return name or _split_of_folder(where, file)


def _split_of_folder(where: Path, file: Path) -> str | None:
    return None if file.parent == where else SPLIT_NAMES.get(file.parent.name.lower())


def _check(where: Path, files: Sequence[Path]) -> None:
    """Checks that files are regular ones, of one data set, with one name each, and all there."""
    homes: dict[Path, Path] = {}
    stems: dict[tuple[str | None, str], Path] = {}
    for file in files:
        check_regular(file)
        home = file.parent.parent if _split_of_folder(where, file) else file.parent
        homes.setdefault(home, file)
        other = stems.setdefault((_split(where, file), file.stem), file)
        if other != file:
            raise UserError(f"{file}: has the name of {other}, and is in the same split; rename it")
    if len(homes) > 1:
        first, second = list(homes)[:2]
        raise UserError(
            f"{where}: holds several data sets, in {first} and {second}; "
            "set config.data.dir to the folder of one"
        )
    _check_complete(files)


def _check_complete(files: Sequence[Path]) -> None:
    """Checks by names such as train-00000-of-00004 that none is missing; a download can stop."""
    numbers: dict[tuple[Path, int], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-(\d{1,6})-of-(\d{1,6})\b.*", file.stem):
            series = (file.with_name(match[1]), int(match[3]))
            numbers.setdefault(series, set()).add(int(match[2]))
    for (path, count), there in numbers.items():
        for number in range(count):
            if number not in there:
                raise UserError(
                    f"{path}-{number:05d}-of-{count:05d}: is missing, but others of its "
                    f"{count} files are there; fetch it again"
                )
