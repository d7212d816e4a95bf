"""What a run logs, read back from metrics.jsonl and from TensorBoard's files."""

import json
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from bef_jax.errors import UserError
from bef_jax.training.history import History
from tests.special_files import make_special


@pytest.fixture
def history(tmp_path):
    opened = History(tmp_path)
    yield opened
    opened.close()


def on_disk(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """Reads TensorBoard's files, whose records are length, checksum, event, checksum."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder):
    """Returns (tag, step, value) of all events."""
    return [(v.tag, e.step, v.simple_value) for e in events(folder) for v in e.summary.value]


def test_lines_are_written_at_once(history, tmp_path):
    history.write(20, epoch=0.5, loss=0.25)
    expected = [{"step": 20, "epoch": 0.5, "loss": 0.25}]
    assert on_disk(tmp_path) == expected == history.lines
    history.write(40, valid_auc=0.75)
    assert on_disk(tmp_path) == [*expected, {"step": 40, "valid_auc": 0.75}]
    history.close()  # its thread writes the events
    assert scalars(tmp_path) == [("epoch", 20, 0.5), ("loss", 20, 0.25), ("valid_auc", 40, 0.75)]


def test_a_later_run_appends_to_the_lines_of_the_first(history, tmp_path):
    history.write(1, epoch=0.5, loss=3.0)
    later = History(tmp_path)
    later.write(2, epoch=1.0, loss=2.0)
    later.close()
    assert (
        later.lines
        == on_disk(tmp_path)
        == [
            {"step": 1, "epoch": 0.5, "loss": 3.0},
            {"step": 2, "epoch": 1.0, "loss": 2.0},
        ]
    )


def test_truncate_drops_the_lines_after_a_step(history, tmp_path):
    for step in (10, 20, 20, 30):
        history.write(step, loss=1.0)
    history.truncate(20)
    assert [line["step"] for line in history.lines] == [10, 20, 20]
    assert on_disk(tmp_path) == history.lines
    history.write(25, loss=0.5)
    assert [line["step"] for line in on_disk(tmp_path)] == [10, 20, 20, 25]
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_a_line_that_a_kill_cut_short_is_left_out(history, tmp_path):
    history.write(1, epoch=0.5, loss=3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    later = History(tmp_path)
    later.truncate(5)
    later.write(2, epoch=1.0, loss=2.0)
    later.close()
    assert [line["step"] for line in on_disk(tmp_path)] == [1, 2]
    assert on_disk(tmp_path) == later.lines


def test_a_fresh_workdir_has_no_lines(history):
    assert history.lines == []


# What a power cut, an editor or another program leaves in place of a line.
BROKEN_LINES = [
    b"3", b"{}", b"null", b"[]", b'"x"', b'{"step": null}', b"\xff", b"\0" * 100, b"",
    b"{", b"[" * 9000,
    b'{"step": 2, "epoch": 1.0, "loss": "low"}', b'{"step": 2, "loss": 1.0}',
    b'{"step": 2.0, "epoch": 1.0}', b'{"step": true, "epoch": 1.0}', b'{"step": -1, "epoch": 1.0}',
    b'{"step": 2, "epoch": null, "loss": 1.0}', b'{"step": 2, "epoch": NaN}',
    b'{"step": 2, "epoch": 1.0, "loss": 1' + b"0" * 400 + b"}", b'{"step": 2, "epoch": [1.0]}',
    b'{"step": 2, "epoch": 1.0, "loss": true}', b"x" * 200_000,
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN_LINES, ids=range(len(BROKEN_LINES)))
def test_a_line_that_no_run_wrote_is_left_out(text, history, tmp_path):
    history.write(1, epoch=0.5, loss=3.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(text + b"\n")
    history.write(2, epoch=1.0, grad_norm=float("inf"))
    later = History(tmp_path)
    later.truncate(2)
    later.close()
    assert [line["step"] for line in later.lines] == [1, 2]
    assert len(on_disk(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_a_special_file_is_refused_at_once(kind, tmp_path):
    make_special(kind, tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=rf"metrics\.jsonl: is a {kind}"):
        History(tmp_path)


def test_a_fresh_start_begins_a_fresh_file(history, tmp_path):
    """A run that was killed before its first save leaves lines, but no run goes on from them."""
    for step in (1, 2):
        history.write(step, epoch=1.0, loss=3.0)
    later = History(tmp_path)
    later.truncate(0)
    later.write(1, epoch=1.0, loss=2.0)
    later.close()
    assert [line["loss"] for line in on_disk(tmp_path)] == [2.0]


def test_tensorboard_is_told_which_steps_come_again(history, tmp_path):
    history.write(1, epoch=1.0, loss=3.0)
    history.truncate(5)
    history.close()
    (start,) = [e for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert start.step == 6


def test_no_file_appears_before_the_first_line(history, tmp_path):
    history.truncate(0)
    assert not (tmp_path / "metrics.jsonl").exists()


def many_names(file):
    for start in range(0, 1 << 22, 256):
        names = (b'"%028d":1.5' % number for number in range(start, start + 256))
        file.write(b'{"step":1,"epoch":1,' + b",".join(names) + b"}\n")


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.truncate(1 << 40),
        lambda file: file.write(b'{"step": 1, "epoch": 0.5}\n' * 1_400_000),
        pytest.param(many_names, marks=pytest.mark.slow),
    ],
    ids=["sparse", "short lines", "many names"],
)
def test_a_file_that_is_too_long_is_refused_in_little_memory(write, tmp_path):
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        write(file)
    code = """
import resource, sys
from bef_jax.training.history import History

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
try:
    History(sys.argv[1])
except Exception as error:
    print(type(error).__name__, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    name, mebibytes = done.stdout.split()
    assert name == "UserError"
    assert int(mebibytes) < 1024
