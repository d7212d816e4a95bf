"""Fetches PatchCamelyon's files from Zenodo, and resumes interrupted downloads."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pooch
import requests

from bef_jax.data.chunk import Begin, short_name, silent
from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import check_regular

PCAM_URL = "https://zenodo.org/records/2546921/files/"
RETRIES = 3  # after a broken connection; each continues where the last one stopped
TIMEOUT = 60  # seconds without a byte
BLOCK_BYTES = 1 << 20


class RemoteFile(NamedTuple):
    """Size and checksum of a file, from the list of TensorFlow Datasets."""

    bytes: int
    sha256: str


PCAM_FILES = {
    "camelyonpatch_level_2_split_test_x.h5.gz": RemoteFile(
        800875929, "79174c2201ad521602a5888be8f36ee10875f37403dd3f2086caf2182ef87245"
    ),
    "camelyonpatch_level_2_split_test_y.h5.gz": RemoteFile(
        3040, "0a522005fccc8bbd04c5a117bfaf81d8da2676f03a29d7499f71d0a0bd6068ef"
    ),
    "camelyonpatch_level_2_split_train_x.h5.gz": RemoteFile(
        6421353462, "d619e741468a7ab35c7e4a75e6821b7e7e6c9411705d45708f2a0efc8960656c"
    ),
    "camelyonpatch_level_2_split_train_y.h5.gz": RemoteFile(
        21378, "b74126d2c01b20d3661f9b46765d29cf4e4fba6faba29c8e0d09d406331ab75a"
    ),
    "camelyonpatch_level_2_split_valid_x.h5.gz": RemoteFile(
        805965320, "f82ee1670d027b4ec388048d9eabc2186b77c009655dae76d624c0ecb053ccb2"
    ),
    "camelyonpatch_level_2_split_valid_y.h5.gz": RemoteFile(
        3038, "ce1ae30f08feb468447971cfd0472e7becd0ad96d877c64120c72571439ae48c"
    ),
}


def fetch_pcam(
    folder: Path,
    base_url: str = PCAM_URL,
    files: Mapping[str, RemoteFile] = PCAM_FILES,
    begin: Begin = silent,
) -> None:
    """Fetches those of `files` that `folder` lacks, packed or unpacked, and checks each.

    A file appears under its name only when its size and sha256 are right. The part that an
    interrupted run got stays as <name>.part, and the next run continues from there.

    Raises:
        UserError: a file cannot be reached or written, or arrives with another checksum.
    """
    missing = [name for name in files if not _is_there(folder / name)]
    if not missing:
        return
    registry = {name: f"sha256:{files[name].sha256}" for name in missing}
    # pooch tries again with the same downloader, which continues with what it has. pooch deletes a
    # file whose checksum is wrong, so the next try begins at 0.
    remote = pooch.create(folder, base_url, registry=registry, retry_if_failed=RETRIES)
    for name in missing:
        try:
            remote.fetch(name, downloader=_ResumingDownloader(files[name].bytes, name, begin))
        except UserError:
            raise
        except (OSError, ValueError) as error:  # the errors of requests are OSErrors
            raise UserError(
                f"{base_url}{name}: cannot be fetched ({reason_of(error)}); run again to continue, "
                f"or put the file into {folder} yourself"
            ) from error


def _is_there(packed: Path) -> bool:
    unpacked = packed.with_suffix("")
    # Refuse a FIFO here, because opening one to read or to write waits for another process.
    for file in (packed, unpacked, _part(packed)):
        check_regular(file)
    # A file with its final name counts as whole: it got the name after its checksum was right, and
    # gzip has its own checksum.
    return packed.is_file() or unpacked.is_file()


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


class _ResumingDownloader:
    """A downloader for pooch: appends to <name>.part, then hands the whole file over."""

    def __init__(self, size: int, name: str, begin: Begin):
        self.size = size
        self.name = name
        self.begin = begin

    def __call__(self, url: str, output_file: str, _: pooch.Pooch) -> None:
        # Pooch's own temporary file has another name each time, so it could not be resumed.
        part = _part(Path(output_file).with_name(self.name))
        # A part that is too long is from another version, or from a server that sent too much.
        if _size(part) > self.size:
            part.unlink()
        if _size(part) < self.size:
            self._append(url, part)
        if _size(part) != self.size:
            # pooch tries again only on errors of requests and on wrong checksums.
            raise requests.ConnectionError(f"got {_size(part)} bytes of {self.size}")
        # Both are on one file system, so this is a rename that does not copy 6 GB.
        os.replace(part, output_file)

    def _append(self, url: str, part: Path) -> None:
        start = _size(part)
        headers = {"Range": f"bytes={start}-"} if start else {}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            response.raise_for_status()
            # A server without ranges sends the file from its start, with status 200.
            resumed = response.status_code == requests.codes.partial_content
            advance = self.begin(f"fetching {short_name(self.name)}", self.size, "bytes")
            advance(start if resumed else 0)
            # Append block by block, so that a kill leaves a prefix from which to continue.
            with open(part, "ab" if resumed else "wb") as file:
                for block in response.iter_content(BLOCK_BYTES):
                    file.write(block)
                    advance(len(block))


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
