"""A server with as much of a hub's protocol as fetching a file or a data set needs.

Large files are redirected to another host, with their SHA-256 as ETag, and are resumed by ranges.
Small ones are served directly, with their git SHA-1 as ETag.
"""

import contextlib
import hashlib
import importlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000


@dataclass
class Hub:
    """The files that the server has, how it fails, and the requests that it got.

    Attributes:
        files: {repository: {file: content}} of the branch main. The name of a data set's repository
            begins with datasets/.
        refused: {repository: (status, X-Error-Code)}.
        cut: byte at which each connection that sends a large file breaks; None: never.
        shorter: by how many bytes a large file is shorter than its metadata say.
        stall: byte after which a large file stops, and `stalled` is set; None: never.
        requests: (method, path, Range) of all requests, in order.
        tokens: (path, Authorization) of all requests.
    """

    files: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)
    cut: int | None = None
    shorter: int = 0
    stall: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    endpoint: str = ""


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def environment(monkeypatch, **variables):
    """Sets environment variables and reloads the library's constants, which are made of them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        importlib.reload(constants)
        close_session()
        yield
    importlib.reload(constants)
    close_session()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        self.hub.tokens.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/cdn/"):
            self._send_large(self.path.removeprefix("/cdn/"))
            return
        if match := re.fullmatch(r"/api/(.+)/(revision|tree)/([^/?]*)(\?.*)?", self.path):
            repository, asked, revision = match[1].removeprefix("models/"), match[2], match[3]
            file = None
        else:
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
        if repository in self.hub.refused:
            status, code = self.hub.refused[repository]
            self._send(status, {"X-Error-Code": code} if code else {})
        elif repository not in self.hub.files:
            # The hub answers so to a caller without a token, to hide private repositories.
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif file is None:
            self._send_list(repository, asked)
        elif file not in self.hub.files[repository]:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._send_file(self.hub.files[repository][file])

    def _send_list(self, repository, asked):
        files = [
            {"type": "file", "path": name, "rfilename": name, "size": len(content), "oid": "0" * 40}
            for name, content in self.hub.files[repository].items()
        ]
        info = {"id": repository.removeprefix("datasets/"), "sha": COMMIT, "siblings": files}
        answer = json.dumps(files if asked == "tree" else info).encode()
        self._send(200, {"Content-Type": "application/json"}, answer)

    def _send_file(self, content):
        if len(content) <= LARGE:
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self._send(200, {"ETag": f'"{git}"', "X-Repo-Commit": COMMIT}, content)
            return
        digest = hashlib.sha256(content).hexdigest()
        port = self.server.server_port
        self._send(302, {
            "Location": f"http://localhost:{port}/cdn/{digest}", "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
        })  # fmt: skip

    def _send_large(self, digest):
        content = next(
            content
            for files in self.hub.files.values()
            for content in files.values()
            if hashlib.sha256(content).hexdigest() == digest
        )
        content = content[: len(content) - self.hub.shorter]
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].partition("-")[0])
        headers = {"Content-Length": str(len(content) - start), "ETag": f'"{digest}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        limit = self.hub.cut if self.hub.stall is None else self.hub.stall
        end = len(content) if limit is None else min(len(content), start + limit)
        self._send(206 if start else 200, headers, content[start:end])
        if self.hub.stall is not None:
            self.hub.stalled.set()
            self.connection.recv(1)  # until the other side is gone
        self.close_connection = end < len(content)

    def _send(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def config_of_timm(architecture: str, mean: list, std: list, **fields) -> bytes:
    """Returns a config.json as timm writes it."""
    content = {
        "architecture": architecture, "num_classes": 1000, "num_features": 1280,
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": "in1k", "custom_load": False, "input_size": [3, 224, 224],
            "fixed_input_size": False, "interpolation": "bicubic", "crop_pct": 0.875,
            "crop_mode": "center", "mean": mean, "std": std, "num_classes": 1000,
            "pool_size": [7, 7], "first_conv": "conv_stem", "classifier": "classifier",
        },
        **fields,
    }  # fmt: skip
    return json.dumps(content, indent=2).encode()
