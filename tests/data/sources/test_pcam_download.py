"""Downloads from a local server, compared with its files, and the checksums with those of TFDS."""

import contextlib
import functools
import hashlib
import http.server
import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest

from bef_jax.data.sources import pcam_download, pcam_hdf5
from bef_jax.errors import UserError


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files, with ranges if server.ranges, and hangs up server.hang_ups times."""

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        wanted = self.headers.get("Range", "")
        self.server.requests.append((name, wanted))
        if name not in self.server.files:
            self.send_error(404)
            return
        body = self.server.files[name]
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0) if self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = len(body)
        if self.server.hang_ups:
            self.server.hang_ups -= 1
            stop = start + (len(body) - start) // 2
        self.wfile.write(body[start:stop])

    def log_message(self, *_):
        pass


def registry_of(files):
    return {
        name: pcam_download.RemoteFile(len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    }


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(pcam_download, "RETRIES", 0)
    # A broken connection loses at most one block.
    monkeypatch.setattr(pcam_download, "BLOCK_BYTES", 1000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        body = np.random.default_rng(0).bytes(300_000)
        server.files = {"a.h5.gz": body, "b.h5.gz": b"small"}
        server.requests, server.hang_ups, server.ranges = [], 0, True
        server.url = f"http://127.0.0.1:{server.server_address[1]}/files/"
        server.registry = registry_of(server.files)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch_and_compare(server, folder):
    pcam_download.fetch_pcam(folder, server.url, server.registry)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == server.files


def test_missing_files_are_fetched_once(server, tmp_path):
    folder = tmp_path / "new" / "pcam"
    fetch_and_compare(server, folder)
    fetch_and_compare(server, folder)
    assert server.requests == [("a.h5.gz", ""), ("b.h5.gz", "")]


def test_unpacked_file_is_not_fetched(server, tmp_path):
    (tmp_path / "a.h5").touch()
    pcam_download.fetch_pcam(tmp_path, server.url, server.registry)
    assert server.requests == [("b.h5.gz", "")]


def test_interrupted_file_is_resumed_where_it_stopped(server, tmp_path):
    server.hang_ups = 1
    with pytest.raises(UserError, match=r"a\.h5\.gz: cannot be fetched .*run again to continue"):
        fetch_and_compare(server, tmp_path)
    assert (tmp_path / "a.h5.gz.part").stat().st_size == 150_000
    assert not (tmp_path / "a.h5.gz").exists()
    fetch_and_compare(server, tmp_path)
    assert server.requests[:2] == [("a.h5.gz", ""), ("a.h5.gz", "bytes=150000-")]


def test_broken_connection_is_tried_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pcam_download, "RETRIES", 1)
    server.hang_ups = 1
    fetch_and_compare(server, tmp_path)
    assert server.requests[1] == ("a.h5.gz", "bytes=150000-")


def test_file_of_a_server_without_ranges_is_fetched_from_its_start(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.h5.gz.part").write_bytes(server.files["a.h5.gz"][:1000])
    fetch_and_compare(server, tmp_path)


@pytest.mark.parametrize("size", [300_000, 300_001])
def test_complete_part_is_used_and_one_that_is_too_long_is_fetched_again(size, server, tmp_path):
    whole = server.files["a.h5.gz"]
    (tmp_path / "a.h5.gz.part").write_bytes((whole + b"x")[:size])
    fetch_and_compare(server, tmp_path)
    assert len(server.requests) == (1 if size == 300_000 else 2)


def test_progress_of_fetching_is_reported(server, tmp_path):
    server.hang_ups = 1
    progress = []

    def begin(*arguments):
        progress.append([arguments])
        return progress[-1].append

    for _ in range(2):
        with contextlib.suppress(UserError):
            pcam_download.fetch_pcam(tmp_path, server.url, server.registry, begin)
    first, again, small = progress
    assert first[0] == again[0] == ("fetching a.h5.gz", 300_000, "bytes")
    assert sum(first[1:]) == 150_000
    assert again[1] == 150_000 and sum(again[1:]) == 300_000
    assert small == [("fetching b.h5.gz", 5, "bytes"), 0, 5]


@pytest.mark.parametrize("name", ["a.h5.gz", "a.h5", "a.h5.gz.part"])
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_special_file_in_the_place_of_a_download_is_refused(
    kind, name, tmp_path, special, printed_by
):
    special(kind, tmp_path / name)
    files = "{'a.h5.gz': pcam_download.RemoteFile(1, '0' * 64)}"
    call = f"pcam_download.fetch_pcam(Path({str(tmp_path)!r}), 'http://127.0.0.1:9/', {files})"
    assert printed_by(call) == [f"{tmp_path / name}: is {kind}; name a regular file"]


def test_file_with_a_wrong_checksum_is_an_error_and_is_removed(server, tmp_path):
    right = server.files["a.h5.gz"]
    server.files["a.h5.gz"] = right[::-1]
    with pytest.raises(UserError, match=r"a\.h5\.gz: cannot be fetched .*hash") as caught:
        fetch_and_compare(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    server.files["a.h5.gz"] = right
    fetch_and_compare(server, tmp_path)


def test_wrong_size_and_missing_file_are_errors(server, tmp_path):
    server.files["a.h5.gz"] += b"more"
    with pytest.raises(UserError, match="got 300004 bytes of 300000"):
        fetch_and_compare(server, tmp_path)
    del server.files["a.h5.gz"]
    (tmp_path / "a.h5.gz.part").unlink()
    with pytest.raises(UserError, match="404"):
        fetch_and_compare(server, tmp_path)


def test_server_that_cannot_be_reached_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pcam_download, "RETRIES", 0)
    files = {"a.h5.gz": pcam_download.RemoteFile(1, "0" * 64)}
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/a\.h5\.gz: cannot be fetched"):
        pcam_download.fetch_pcam(tmp_path, "http://127.0.0.1:9/", files)


def test_source_fetches_only_when_asked(server, tmp_path, patches, write, make_data, monkeypatch):
    raw = write("pcam_hdf5_gz", tmp_path / "raw", patches)
    server.files = {file.name: file.read_bytes() for file in raw.iterdir()}
    files = registry_of(server.files)
    assert files.keys() == pcam_download.PCAM_FILES.keys()
    local = functools.partial(pcam_download.fetch_pcam, base_url=server.url, files=files)
    monkeypatch.setattr(pcam_download, "fetch_pcam", local)
    data = make_data("pcam_hdf5", tmp_path / "empty")
    with pytest.raises(UserError, match="no such file"):
        list(pcam_hdf5.read(data))
    assert not server.requests
    data.download = True
    images = [chunk.images for split, chunk in pcam_hdf5.read(data) if split == "train"]
    np.testing.assert_array_equal(np.concatenate(images), patches["train"][0])


def test_sizes_and_checksums_agree_with_those_of_tfds():
    folder = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    table = (folder / "datasets" / "patch_camelyon" / "checksums.tsv").read_text()
    rows = (line.split("\t") for line in table.splitlines())
    known = {name: (int(size), checksum) for _, size, checksum, name in rows}
    assert {name: tuple(file) for name, file in pcam_download.PCAM_FILES.items()} == known
