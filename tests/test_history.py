import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from bef_jax.history import History


@pytest.fixture
def history(tmp_path):
    opened = History(tmp_path)
    yield opened
    opened.close()


def on_disk(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder):
    """(tag, step, value) in TensorBoard's files: records of length, checksum, event, checksum."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def test_lines_are_written_at_once(history, tmp_path):
    history.write(20, epoch=0.5, loss=0.25)
    expected = [{"step": 20, "epoch": 0.5, "loss": 0.25}]
    assert on_disk(tmp_path) == expected == history.lines
    history.write(40, valid_auc=0.75)
    assert on_disk(tmp_path) == [*expected, {"step": 40, "valid_auc": 0.75}]
    history.close()  # its thread writes
    assert scalars(tmp_path) == [("epoch", 20, 0.5), ("loss", 20, 0.25), ("valid_auc", 40, 0.75)]


def test_a_later_run_goes_on(history, tmp_path):
    history.write(1, loss=3.0)
    later = History(tmp_path)
    later.write(2, loss=2.0)
    later.close()
    assert later.lines == on_disk(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_truncate_drops_what_came_after(history, tmp_path):
    for step in (10, 20, 20, 30):
        history.write(step, loss=1.0)
    history.truncate(20)
    assert [line["step"] for line in history.lines] == [10, 20, 20]
    assert on_disk(tmp_path) == history.lines
    history.write(25, loss=0.5)
    assert [line["step"] for line in on_disk(tmp_path)] == [10, 20, 20, 25]
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_a_line_that_a_kill_cut_short_is_left_out(history, tmp_path):
    history.write(1, loss=3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    later = History(tmp_path)
    later.truncate(5)
    later.write(2, loss=2.0)
    later.close()
    assert on_disk(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_a_fresh_workdir_has_no_lines(history):
    assert history.lines == []
