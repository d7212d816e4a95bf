"""Kills real processes that score a slide, fills their disk, and compares what they leave."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.slides.slide_files import GLASS, tissue_pixels, write_pyramid
from tests.test_faults import namespaces, one_line, run_on_small_disk  # noqa: F401

# Runs the program, and appends a line to the first argument's file for each block that is read. A
# pause at each read makes sure that kills come in the middle of the slide.
COUNTING = """
import sys, time
from bef_jax import main
from bef_jax.slides import blocks
log, pause = sys.argv[1], float(sys.argv[2])
del sys.argv[1:3]
original = blocks.read_block

def read_block(slide, grid, block):
    found = original(slide, grid, block)
    with open(log, "a") as file:
        file.write(f"{block.rows.start} {block.columns.start}\\n")
    time.sleep(pause)
    return found

blocks.read_block = read_block
main.run()
"""
ROWS, ACROSS = 16, 2  # rows of blocks, and blocks in each
KILLS = 20


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """Returns the path of a slide of 16 rows of two blocks, with some tissue in each."""
    pixels = np.full((ROWS * 960 - 200, ACROSS * 960 - 500, 3), GLASS, np.uint8)
    for top in range(0, len(pixels) - 200, 960):
        pixels[top + 100 : top + 240, 900:1100] = tissue_pixels(200, 140, top)
    path = tmp_path_factory.mktemp("slides") / "case" / "a.tif"
    path.parent.mkdir()
    return write_pyramid(path, pixels, 0.972, (1, 2), compression="deflate")


def command(networks, slide, workdir, log, pause=0.0):
    """Returns the command that scores the slide's folder."""
    workdir.mkdir(parents=True, exist_ok=True)
    return [
        sys.executable, "-c", COUNTING, str(log), str(pause), "--mode=predict",
        # The program must not start itself again, because that leaves out the script.
        "--nomemory_settings",
        f"--checkpoint={networks()}", f"--workdir={workdir}", f"--input={slide.parents[1]}",
    ]  # fmt: skip


def finish(words):
    """Runs the command to its end."""
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def lines(file):
    return file.read_text().splitlines() if file.exists() else []


def results(workdir):
    """Returns the bytes of all that lies below slides/, of the table and of the page."""
    found = {}
    for path in [*(workdir / "slides").rglob("*"), *workdir.glob("slides.*")]:
        if path.name == "slide.json":
            found[path.relative_to(workdir)] = json.loads(path.read_text()) | {"seconds": 0}
        elif path.is_file():
            found[path.relative_to(workdir)] = path.read_bytes()
    return found


def disturb(words, log, rng):
    """Starts a run, and kills it soon after some of its reads, or at the start or the end.

    Returns:
        The signal, the status and the last line on stderr.
    """
    signum = rng.choice([signal.SIGKILL, signal.SIGTERM])
    reads = len(lines(log)) + rng.randrange(0, ACROSS + 2)
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and len(lines(log)) < reads:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signum)
        errors = process.communicate()[1]
    return signum, process.returncode, errors.splitlines()[-1:]


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(networks, slide, tmp_path):
    seed = int(os.environ.get("BEF_KILL_SEED", time.time_ns()))
    rng, log = random.Random(seed), tmp_path / "reads"
    undisturbed = command(networks, slide, tmp_path / "a" / "run", tmp_path / "all_reads")
    finish(undisturbed)
    assert len(lines(tmp_path / "all_reads")) == ROWS * ACROSS
    words = command(networks, slide, tmp_path / "b" / "run", log, pause=0.1)
    stopped = 0
    for number in range(KILLS):
        before = len(lines(log))
        signum, status, last = disturb(words, log, rng)
        print(f"kill {number}: {signum.name}, status {status}, {len(lines(log))} reads, {last}")
        # SIGTERM ends a run with its row; before the slide is begun, Python ends at once.
        assert status in (0, -signum, 1 if signum == signal.SIGTERM else 0), last
        if status == 1:
            assert "the same command goes on there" in last[0]
            stopped += 1
        again = set(lines(log)[:before]) & set(lines(log)[before:])
        assert len({block.split()[0] for block in again}) <= 1, f"seed {seed}"
    finish(words)
    print(f"{stopped} stopped by SIGTERM in the slide; {len(lines(log))} reads; seed {seed}")
    assert len(lines(log)) <= (ROWS + KILLS) * ACROSS
    assert len(set(lines(log))) == ROWS * ACROSS
    assert results(tmp_path / "b" / "run") == results(tmp_path / "a" / "run"), f"seed {seed}"


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_disk_that_fills_loses_no_row(networks, slide, tmp_path):
    disk = tmp_path / "b"
    undisturbed = command(networks, slide, tmp_path / "a" / "run", tmp_path / "all_reads")
    finish(undisturbed)
    words = command(networks, slide, disk / "run", tmp_path / "reads")
    (disk / "run").rmdir()
    disk.rmdir()
    # The disk is as large as some of the rows, and the bytes that a check writes for a moment.
    statuses, errors, left, summary = run_on_small_disk(disk, "100k", words)
    assert statuses == [1, 0], errors
    assert "No space left on device" in one_line(errors)
    assert "run it again; it goes on" in one_line(errors)
    saved = [file for file in left if ".partial/row" in file]
    assert saved
    assert len(lines(tmp_path / "reads")) <= (ROWS + 1) * ACROSS
    assert json.loads(summary)["slides"]["done"] == 1
