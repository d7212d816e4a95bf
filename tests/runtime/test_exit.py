"""The end of a run: its last line on stderr, which nothing follows, and its exit status."""

import signal
import subprocess
import sys

import jax
import pytest

from bef_jax.errors import DivergedError, RunError, UserError
from bef_jax.runtime import exit


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.fixture
def second_of_two(monkeypatch):
    """Makes this process look like one of two; its os._exit raises SystemExit."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(exit.os, "_exit", sys.exit)


ERRORS = [
    (UserError("no such file"), 2, "error: no such file\n"),
    (RunError("no device"), 1, "failed: no device\n"),
    (DivergedError("loss is nan", 3), 1, "failed: loss is nan\n"),
    (FloatingPointError("two\nlines"), 1, "failed: two\\nlines\n"),
]


@pytest.mark.parametrize(("error", "status", "line"), ERRORS)
def test_an_error_becomes_one_line_and_a_status(error, status, line, capsys):
    assert exit.status_after(error) == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(("error", "status", "line"), ERRORS)
def test_one_of_several_processes_does_not_wait_for_the_others(
    error, status, line, second_of_two, capsys
):
    with pytest.raises(SystemExit) as ended:
        exit.status_after(error)
    assert ended.value.code == status
    assert capsys.readouterr() == ("", line)


def test_a_bug_is_raised(capsys):
    bug = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError) as raised:
        exit.status_after(bug)
    assert raised.value is bug
    assert capsys.readouterr() == ("", "")


def test_an_error_that_may_be_a_lost_host_names_the_process_last(second_of_two, capsys):
    try:
        raise RuntimeError("Gloo:\n  connection closed")
    except RuntimeError as error:
        with pytest.raises(SystemExit) as ended:
            exit.status_after(error)
    assert ended.value.code == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback")
    assert last == (
        "failed: process 1 of 2: Gloo: connection closed; if the cause is that another process was "
        "lost, run the same command on all hosts; training goes on from its last checkpoint"
    )


# One thread, which is not a daemon, sleeps for ten minutes. `late` prints right before the process
# ends, as a thread of Orbax may do.
FULL_DISK = """
import os, sys, threading, time
from bef_jax.runtime import exit

def late(status, end=os._exit):
    print("a thread talks on", file=sys.stderr, flush=True)
    end(status)

os._exit = late
threading.Thread(target=time.sleep, args=[600]).start()
exit.status_after(RuntimeError("write:\\n No space left on device"))
"""


def test_on_a_full_disk_the_reason_is_the_last_line_and_no_thread_delays_the_end():
    result = run(FULL_DISK)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "failed: write: No space left on device; "
        "free some space, and run it again; it goes on from what was saved last\n"
    )


def test_a_summary_with_pictures_that_cannot_be_read_is_a_failure(capsys):
    assert exit.status_of({"mode": "predict"}) == exit.status_of({"unreadable": []}) == 0
    assert capsys.readouterr() == ("", "")
    unreadable = [{"file": "a\nb.png", "reason": "cut"}, {"file": "c.png", "reason": "empty"}]
    assert exit.status_of({"unreadable": unreadable}) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: 2 of the pictures can't be read and got no prediction; ")
    assert line.endswith("the first is a\\nb.png: cut")
    unreadable += [{"file": f"{number}{{}}.svs", "reason": "cut"} for number in range(20)]
    assert exit.status_of({"unreadable": unreadable, "slides": {"n": 30}}) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: 22 of the slides and pictures can't be read, or not in full; ")
    assert "; a\\nb.png, c.png, 0{}.svs, " in line
    assert "17{}.svs and 2 more; predict_summary.json lists them" in line


@pytest.mark.parametrize(
    ("body", "status", "is_printed"),
    [
        ("os.abort()", -signal.SIGABRT, True),
        ("pass", 0, False),
        ("sys.exit(1)", 1, False),
    ],
)
def test_the_text_is_printed_only_if_the_process_is_killed(body, status, is_printed):
    code = (
        "import os, sys; from bef_jax.runtime import exit\n"
        f"with exit.print_if_killed('failed: $HOME is lost'): {body}"
    )
    result = run(code)
    assert result.returncode == status
    assert ("failed: $HOME is lost" in result.stderr.splitlines()) == is_printed
