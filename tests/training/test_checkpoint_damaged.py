"""Checkpoints that were cut, edited or replaced: each gives one line of error, and none hangs."""

import json
from pathlib import Path

import pytest

from bef_jax.configs.default import get_config
from bef_jax.errors import UserError
from bef_jax.runtime import files
from bef_jax.training import checkpoint
from bef_jax.training.checkpoint import Checkpoints
from tests.checkpoints import read
from tests.special_files import BRACKETS, make_special


def files_of_state_and_run(path):
    expected = json.loads((path / checkpoint.CHECKSUMS).read_text())
    return [name for name in sorted(expected) if not name.startswith("metrics/")]


def test_checksums_cover_every_file_of_every_item(saved):
    there = {p.relative_to(saved).as_posix() for p in saved.glob("*/**/*") if p.is_file()}
    assert set(json.loads((saved / checkpoint.CHECKSUMS).read_text())) == there
    assert {Path(name).parts[0] for name in there} == {"state", "run", "metrics"}


@pytest.mark.smoke
def test_a_flipped_bit_in_any_file_is_found_and_named(saved):
    for name in files_of_state_and_run(saved):
        content = (saved / name).read_bytes()
        if not content:
            continue
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        (saved / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"3 is damaged: \S*{name} is not what was saved"):
            read(saved)
        (saved / name).write_bytes(content)
    read(saved)


def test_a_missing_file_is_named(saved):
    for name in files_of_state_and_run(saved):
        (saved / name).rename(saved / "away")
        with pytest.raises(UserError, match=f"{name} is not what was saved"):
            read(saved)
        (saved / "away").rename(saved / name)


def test_checkpoints_of_versions_without_checksums_are_read(saved):
    (saved / checkpoint.CHECKSUMS).unlink()
    read(saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[[1, 2]]", '{"state/x": 3}', BRACKETS, "\0"]
)
def test_damaged_checksums_are_named(saved, text):
    (saved / checkpoint.CHECKSUMS).write_text(text)
    with pytest.raises(UserError, match=r"3/checksums\.json: damaged .*; move the checkpoint away"):
        read(saved)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("run/" + "x" * 5000, id="run/ and 5000 letters"),
        "run/../../secret",
        "run/\0",
        "run/",
        "run/.",
    ],
)
def test_a_checksum_of_a_name_that_is_no_file_of_the_checkpoint_is_damage(saved, name):
    """The checksum is right for the file that the name leads to, if there is one."""
    (saved.parent / "secret").write_text("")
    checksum = files.sha256(saved.parent / "secret")
    edit_json(saved / checkpoint.CHECKSUMS, lambda sums: sums | {name: checksum})
    with pytest.raises(UserError, match=r"3 is damaged: .* is not what was saved"):
        checkpoint.read_metadata(saved)


@pytest.mark.parametrize(
    "text",
    ['{"valid_auc": 0.', "", "[]", "3", "{}", '{"valid_auc": null}', '{"valid_auc": NaN}',
     '{"valid_auc": "high"}', '{"valid_auc": 7}', BRACKETS],
)  # fmt: skip
def test_a_damaged_score_is_named_and_not_ignored(saved, text):
    (saved / "metrics" / "metrics").write_text(text)
    for read_scores in (checkpoint.best, lambda workdir: Checkpoints(workdir, 2)):
        with pytest.raises(UserError, match=r"3/metrics/metrics: damaged .*--checkpoint"):
            read_scores(saved.parents[1])


@pytest.mark.parametrize("text", ["[]", "3", BRACKETS, '{"item_handlers": 3}'])
def test_damaged_metadata_of_orbax_can_be_deleted(saved, text):
    (saved / "_CHECKPOINT_METADATA").write_text(text)
    with pytest.raises(UserError, match=r"\*/_CHECKPOINT_METADATA: one of .*; delete these"):
        Checkpoints(saved.parents[1], 2)
    (saved / "_CHECKPOINT_METADATA").unlink()
    Checkpoints(saved.parents[1], 2).close()
    read(saved)


def test_metadata_that_is_too_long_is_not_read(saved):
    (saved / checkpoint.CHECKSUMS).unlink()
    with (saved / "state" / "_METADATA").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="state/_METADATA: is longer than any"):
        read(saved)


def edit_json(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


GOOD = {"config": {"name": "tiny"}}


@pytest.mark.parametrize(
    "run",
    [
        [], None, 3, {}, {"config": None}, {"config": "b2"}, {"config": []},
        GOOD | {"clock": "late"}, GOOD | {"clock": {"wall": "late"}}, GOOD | {"clock": None},
        GOOD | {"clock": {"wall": float("nan")}}, GOOD | {"content": 3},
        GOOD | {"operating_point": 3}, GOOD | {"operating_point": {"threshold": 0.5}},
        GOOD | {"operating_point": {"chosen_on": 1, "threshold": 0.5, "temperature": 1.0}},
        GOOD | {"operating_point": {"chosen_on": "x", "threshold": "0", "temperature": 1.0}},
    ],
)  # fmt: skip
def test_run_metadata_of_another_shape_is_named(saved, run):
    (saved / checkpoint.CHECKSUMS).unlink()
    (saved / "run" / "metadata").write_text(json.dumps(run))
    with pytest.raises(
        UserError, match=r"3/run/metadata: damaged \(.*\); move the checkpoint away"
    ):
        checkpoint.read_metadata(saved)


@pytest.mark.parametrize(
    "added",
    [
        {},
        {"clock": {"wall": 3}, "content": "ab"},
        {"operating_point": {"chosen_on": "valid", "threshold": None, "temperature": None}},
    ],
)
def test_run_metadata_of_an_older_version_or_without_a_threshold_is_read(saved, added):
    (saved / checkpoint.CHECKSUMS).unlink()
    (saved / "run" / "metadata").write_text(json.dumps(GOOD | added))
    assert checkpoint.read_metadata(saved) == GOOD | added
    assert checkpoint.read_config(saved).name == "tiny"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": 3}, "its config is damaged .model is int"),
        ({"model": {"gone": 1}}, "config.model.gone is unknown"),
        ({"batch_size": "many"}, "config.batch_size='many' has the wrong type"),
        ({"batch_size": {"x": 1}}, "config.batch_size.x is unknown"),
        ({"steps": 2**63}, "config.steps=.* is out of range"),
        ({"epochs": 10**400}, "its config is damaged"),
        ({"model": {"name": "efficientnet_z"}}, "config.model.name='efficientnet_z' is unknown"),
        ({"a.b": 1}, "its config is damaged"),
        ({"update": 1}, "its config is damaged|config.update is unknown"),
    ],
)
def test_a_field_that_this_version_cannot_read_is_named_with_its_checkpoint(saved, config, message):
    (saved / checkpoint.CHECKSUMS).unlink()
    (saved / "run" / "metadata").write_text(json.dumps({"config": config}))
    with pytest.raises(UserError, match=f"^checkpoint {saved}: {message}"):
        checkpoint.read_config(saved)
    with pytest.raises(UserError, match=f"^checkpoint {saved}: {message}"):
        checkpoint.check_fits(config, get_config(), saved)


# ---- special files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [("FIFO", "is a FIFO"), ("device", "is a device"), ("link to a folder", "is a folder"),
     ("link to nothing", "links to nothing")],
)  # fmt: skip
@pytest.mark.parametrize("checksums", [True, False])
def test_a_special_file_in_a_checkpoint_is_refused_and_not_opened(saved, kind, message, checksums):
    if not checksums:
        (saved / checkpoint.CHECKSUMS).unlink()
    contents = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    for path in [*contents, saved / "state" / "another", saved / "state" / "d" / "another"]:
        make_special(kind, path)
        for read_checkpoint in (read, lambda path: Checkpoints(path.parents[1], 2)):
            with pytest.raises(UserError, match=f"{path}: {message}"):
                read_checkpoint(saved)
        path.unlink()
        if path in contents:
            path.write_bytes(contents[path])
    read(saved)


@pytest.mark.parametrize("kind", ["FIFO", "file", "link to nothing"])
def test_something_else_in_place_of_the_checkpoints_folder_is_refused(tmp_path, kind):
    place = tmp_path / "checkpoints"
    place.touch() if kind == "file" else make_special(kind, place)
    with pytest.raises(UserError, match="checkpoints: is in the way of an output folder; move"):
        Checkpoints(tmp_path, 2)
    with pytest.raises(UserError, match="checkpoints: no checkpoint there"):
        checkpoint.best(tmp_path)


def test_only_folders_with_a_plain_number_are_steps(saved):
    for name in ("\u00b2", "007", "-1", "5.tmp", "x"):
        (saved.parent / name).mkdir()
    (saved.parent / "9").touch()
    (saved.parent / "latest").symlink_to("3")
    assert checkpoint.saved_steps(saved.parents[1]) == [3]
    checkpoints = Checkpoints(saved.parents[1], 2)
    assert checkpoints.newest() == saved
    checkpoints.close()
    (saved.parent / "1\u0663").mkdir()  # Orbax reads this as 13
    with pytest.raises(UserError, match="is not a checkpoint of a run; move it away"):
        Checkpoints(saved.parents[1], 2)
