"""Records of benchmarks, read back from their JSON files."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import jax
import pytest

from bef_jax.errors import UserError
from bef_jax.planning import benchmark_records

NOON = datetime(2026, 11, 23, 12)


@pytest.fixture(autouse=True)
def noon(monkeypatch):
    """Stops the clock of the records, because a file has the name of its day."""

    class Stopped(datetime):
        @classmethod
        def now(cls):
            return NOON

    monkeypatch.setattr(benchmark_records, "datetime", Stopped)


def test_entries_of_one_day_share_a_file(tmp_path):
    folder = tmp_path / "some" / "results"
    for number in (1, 2):
        file = benchmark_records.results_file(folder, "AMD EPYC, 2 cores")
        benchmark_records.append(
            file, {"number": number}, ["--config=configs/b2.py", "--config.name=a b"]
        )
    assert [entry.name for entry in folder.iterdir()] == [file.name]
    assert file.name == "amd-epyc-2-cores-2026-11-23.json"
    entries = json.loads(file.read_text())
    assert [entry["summary"]["number"] for entry in entries] == [1, 2]
    assert entries[0]["command"] == (
        "python -m bef_jax.main --config=configs/b2.py '--config.name=a b'"
    )
    assert entries[0]["versions"].keys() == {"jax", "jaxlib", "flax", "python"}
    assert entries[0]["versions"]["jax"] == jax.__version__
    assert datetime.fromisoformat(entries[0]["timestamp"]) == NOON.astimezone()


def test_threads_that_write_at_once_lose_no_entry(tmp_path, monkeypatch):
    """Reading is slow here, so that another thread could write in the meantime."""
    read = benchmark_records.read

    def slow_read(file):
        entries = read(file)
        time.sleep(0.05)
        return entries

    monkeypatch.setattr(benchmark_records, "read", slow_read)
    file = benchmark_records.results_file(tmp_path, "A CPU")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: benchmark_records.append(file, {"number": n}, []), range(8)))
    numbers = [entry["summary"]["number"] for entry in json.loads(file.read_text())]
    assert sorted(numbers) == list(range(8))


@pytest.mark.parametrize(
    ("hardware", "slug"),
    [
        ("Intel(R) Xeon(R) CPU @ 2.20GHz, 8 cores", "intel-r-xeon-r-cpu-2-20ghz-8-cores"),
        ("8 x NVIDIA H100 80GB HBM3", "8-x-nvidia-h100-80gb-hbm3"),
    ],
)
def test_file_name_has_only_letters_digits_and_dashes(hardware, slug, tmp_path):
    name = benchmark_records.results_file(tmp_path, hardware).name
    assert name == f"{slug}-2026-11-23.json"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{folder}: .*name another --results"):
            benchmark_records.results_file(folder, "cpu")


@pytest.mark.parametrize("content", ["[{", "{}", "\x00", "", "3", "null", "[" * 100_000])
def test_a_file_without_a_list_is_refused_and_kept(content, tmp_path):
    file = benchmark_records.results_file(tmp_path, "cpu")
    file.write_text(content)
    with pytest.raises(UserError, match=f"{file}: damaged .*; move it away"):
        benchmark_records.results_file(tmp_path, "cpu")
    with pytest.raises(UserError, match=f"{file}: damaged .*; move it away"):
        benchmark_records.append(file, {}, [])
    assert file.read_text() == content


def test_a_fifo_in_place_of_results_is_refused_at_once(tmp_path):
    os.mkfifo(benchmark_records.results_file(tmp_path, "cpu"))
    with pytest.raises(UserError, match=r"cpu-.*\.json: is in the way of an output file"):
        benchmark_records.results_file(tmp_path, "cpu")
