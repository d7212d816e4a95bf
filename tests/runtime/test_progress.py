"""The display of progress, on a clock that the tests move, against lines written by hand."""

import io
import re

import pytest
from rich.console import Console

from bef_jax.runtime import progress
from bef_jax.runtime.progress import Phases, Progress, Slides


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def console(terminal, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, no_color=True, width=width)


def test_without_a_terminal_a_line_appears_every_ten_seconds(clock):
    out = console(terminal=False)
    with Progress(1000, start_step=500, console=out) as shown:
        for step in range(501, 1001):
            shown.update(step, loss=step / 1000, images_per_second=1234.5)
            clock[0] += 0.0625  # exact in binary: 160 steps are 10 s
    lines = out.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 501/1,000",
        "step 661/1,000",
        "step 821/1,000",
        "step 981/1,000",
        "step 1,000/1,000",
    ]
    assert "loss 0.821" in lines[2] and "1,234 images/s" in lines[2]
    assert lines[2].endswith("0:00:11 left")  # 179 steps of 0.0625 s
    assert lines[4].endswith("0:00:00 left")


def test_time_left_counts_from_the_first_update_not_from_compilation(clock):
    out = console(terminal=False)
    with Progress(100, console=out, line_seconds=0) as shown:
        clock[0] += 3600
        shown.update(10)
        clock[0] += 20
        shown.update(20)
    first, second = out.file.getvalue().splitlines()
    assert "left" not in first
    assert second.endswith("0:02:40 left")


def test_a_figure_keeps_its_value_until_the_next(clock):
    out = console(terminal=False)
    with Progress(3, console=out, line_seconds=0) as shown:
        shown.update(1, valid_auc=0.9123, input_wait_fraction=0.256)
        shown.update(2, valid_auc=None)
        shown.update(3, valid_auc=0.95)
    lines = out.file.getvalue().splitlines()
    assert ["AUC 0.9123" in line for line in lines] == [True, True, False]
    assert all("wait 26%" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_bar_shows_every_figure(clock, width):
    out = console(terminal=True, width=width)
    with Progress(60_000, console=out) as shown:
        shown.update(100)
        clock[0] += 100
        figures = {"loss": 0.25, "valid_auc": 0.97, "images_per_second": 1234}
        shown.update(40_000, **figures, input_wait_fraction=0.02)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.file.getvalue()).split("\r")[-1]
    for text in ("40,000/60,000", "0.250", "0.9700", "1,234 images/s", "2%", "0:00:50 left"):
        assert text in last


@pytest.mark.parametrize("terminal", [True, False])
def test_log_prints_the_text_as_it_is(terminal):
    out = console(terminal=terminal)
    with Progress(10, console=out) as shown:
        shown.log("[bold] saved to runs/[b2]")
    assert "[bold] saved to runs/[b2]" in out.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_stdout_is_left_alone(capfd, terminal):
    with Progress(10, console=Console(stderr=True, force_terminal=terminal, width=80)) as shown:
        shown.update(10, loss=0.5)
        print("the summary")
    captured = capfd.readouterr()
    assert captured.out == "the summary\n"
    assert "loss 0.500" in captured.err


def test_progress_goes_to_stderr_by_default(capfd):
    with Progress(10) as shown:
        shown.update(10, loss=0.5)
    captured = capfd.readouterr()
    assert captured.out == "" and "loss 0.500" in captured.err


# ---- phases -------------------------------------------------------------------------------------


def test_phases_print_lines_with_progress_and_time_left(clock):
    out = console(terminal=False)
    with Phases(console=out) as phases:
        read = phases.begin("reading train", 5120, "patches")
        for _ in range(10):
            clock[0] += 4
            read(512)
        check = phases.begin("verifying", 3_000_000_000, "bytes")
        clock[0] += 2
        check(1_000_000_000)
        clock[0] += 10
        check(1_500_000_000)
        clock[0] += 1
        check(500_000_000)
    assert out.file.getvalue().splitlines() == [
        "reading train: 512/5,120 patches",
        "reading train: 2,048/5,120 patches  128/s  0:00:24 left",
        "reading train: 3,584/5,120 patches  128/s  0:00:12 left",
        "reading train: 5,120/5,120 patches  128/s  in 0:00:40",
        # 1,000 MB has no line, because only 2 of 10 s had passed since the last one.
        "verifying: 2,500/3,000 MB  150/s  0:00:03 left",
        "verifying: 3,000/3,000 MB  182/s  in 0:00:13",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_finished_phase_keeps_its_time(clock, width):
    out = console(terminal=True, width=width)
    with Phases(console=out) as phases:
        for name in ("reading valid", "checking files (sha256)"):
            advance = phases.begin(name, 32_768, "patches")
            for _ in range(2):
                clock[0] += 34
                advance(16_384)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.file.getvalue())
    first, second = shown.replace("\r", "\n").split("\n")[-3:-1]
    for line, name in ((first, "reading valid"), (second, "checking files (sha256)")):
        assert line.startswith(name)
        assert "32,768/32,768 patches  482/s  in 0:01:08" in line


def test_brackets_in_a_name_are_shown_and_a_quiet_console_shows_nothing():
    out = console(terminal=True)
    with Phases(console=out) as phases:
        phases.begin("[bold]unpacking", 3, "bytes")(3)
    assert "[bold]unpacking" in out.file.getvalue()
    for quiet in (False, True):
        out = Console(file=io.StringIO(), quiet=quiet)
        with Phases(console=out) as phases:
            phases.begin("[bold]unpacking", 3, "bytes")(3)
        assert out.file.getvalue() == ("" if quiet else "[bold]unpacking: 0/0 MB  in 0:00:00\n")


def test_slides_say_how_far_each_is_and_all_are(clock):
    """All slides have 1,000 tiles; 300 of them, and a whole slide, are of an earlier run."""
    out = console(terminal=False)
    with Slides(4, 4000, console=out) as shown:
        shown.begin("a.svs", 1000)
        clock[0] += 3600  # compiling
        for _ in range(10):
            shown.advance(100)
            clock[0] += 2
        shown.begin("done.svs", 1000)
        shown.begin("b.svs", 1000)
        assert shown.place == "slide 3 of 4"
        shown.saved(300)
        for _ in range(7):
            shown.advance(100)
            clock[0] += 2
        shown.begin("c.svs", 1000)
        shown.advance(1000)
    assert out.file.getvalue().splitlines() == [
        "a.svs: 100/1,000 tiles; slide 1/4",
        "a.svs: 600/1,000 tiles  50/s  0:00:08 left; slide 1/4  0:01:08 left",
        "b.svs: 400/1,000 tiles  50/s  0:00:12 left; slide 3/4  0:00:32 left",
        "b.svs: 900/1,000 tiles  50/s  0:00:02 left; slide 3/4  0:00:22 left",
        "c.svs: 1,000/1,000 tiles  76/s  0:00:00 left; slide 4/4  0:00:00 left",
    ]


def test_a_terminal_of_80_columns_has_both_bars_of_slides(clock):
    out = console(terminal=True, width=80)
    with Slides(1000, 90_000_000, console=out) as shown:
        shown.begin("folder/[bold]" + "a" * 80 + "-01.svs", 120_000)
        for _ in range(2):
            shown.advance(60_000)
            clock[0] += 10
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.file.getvalue())
    slide, folder = text.replace("\r", "\n").split("\n")[-3:-1]
    assert "aaa-01.svs" in slide
    assert "120,000/120,000 tiles  6,000/s  0:00:00 left" in slide
    assert folder.startswith("slides")
    assert "1/1,000  4:09:40 left" in folder
