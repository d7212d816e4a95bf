"""Data sets by name, from a local server that speaks the hub's protocol and can fail."""

import sys
import time
from pathlib import Path

import pytest

from bef_jax.data.sources import parquet as source
from tests.data.sources.conftest import expect_error, read_all
from tests.data.sources.parquet_files import NUMBERS, numbers_of, write_splits
from tests.hub_server import environment, serve

NAME = "hf:1aurent/PatchCamelyon"


@pytest.fixture
def server(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: '.[hub]'")
    folder = write_splits(tmp_path / "made")
    with serve() as running:
        running.files["datasets/1aurent/PatchCamelyon"] = {
            "README.md": b"cc0",
            **{
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in folder.rglob("*.parquet")
            },
        }
        with environment(monkeypatch, HF_ENDPOINT=running.endpoint, HF_HOME=str(tmp_path / "hf")):
            # The library would sleep for seconds between two tries.
            monkeypatch.setattr(time, "sleep", lambda seconds: None)
            yield running


def test_a_data_set_is_fetched_once(server, make_data, monkeypatch):
    data = make_data("parquet", NAME)
    assert numbers_of(read_all(data)[1]) == NUMBERS
    assert not any("README" in path for _, path, _ in server.requests)
    server.requests.clear()
    assert numbers_of(read_all(data)[1]) == NUMBERS
    assert not any(method == "GET" and "/resolve/" in path for method, path, _ in server.requests)
    with environment(monkeypatch, HF_HUB_OFFLINE="1"):
        assert numbers_of(read_all(data)[1]) == NUMBERS
        expect_error(make_data("parquet", "hf:a/other"), "hf:a/other: incomplete in ")
    assert source.home(data) == Path("data/1aurent--PatchCamelyon")
    assert source.identity(data)["dir"] == NAME


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:a/nowhere", "no such repository, or a private one: set HF_TOKEN"),
        (f"{NAME}@v2", "has no revision v2; give another after @"),
        ("hf:a/gated", "is gated: accept its terms on its page, and set HF_TOKEN"),
        ("hf:a/down", "answers 503: try again later"),
        ("hf:a/b/c", "write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"),
        ("hf:", "write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"),
    ],
)
def test_what_the_hub_refuses(name, message, server, make_data):
    server.refused["datasets/a/gated"] = (403, "GatedRepo")
    server.refused["datasets/a/down"] = (503, "")
    expect_error(make_data("parquet", name), name, message)


def test_a_data_set_without_parquet_files_is_named(server, make_data):
    server.files["datasets/a/empty"] = {"README.md": b"empty"}
    expect_error(make_data("parquet", "hf:a/empty"), "hf:a/empty: holds no .parquet file")


def test_a_download_that_breaks_off_is_not_used(server, make_data):
    server.files["datasets/a/cut"] = {"train.parquet": bytes(50_000)}
    server.shorter = 5
    expect_error(make_data("parquet", "hf:a/cut"), "hf:a/cut: ", "no part of it is used")


def test_a_damaged_cache_is_found(server, make_data, tmp_path):
    content = bytes(50_000)
    server.files["datasets/a/large"] = {"train.parquet": content}
    expect_error(make_data("parquet", "hf:a/large"), "train.parquet: cannot be read")
    (path,) = (tmp_path / "hf").rglob("train.parquet")
    path.resolve().write_bytes(content[:-1] + b"x")
    expect_error(make_data("parquet", "hf:a/large"), "is damaged: delete it, so that it is fetched")


def test_without_the_library_the_error_says_how_to_install_it(make_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    expect_error(make_data("parquet", NAME), "needs huggingface_hub: pip install")
