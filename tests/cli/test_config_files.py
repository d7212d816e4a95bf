"""Checks which file --config finds, and how it reports a file that fails."""

from pathlib import Path

import pytest

from bef_jax.cli.config_files import check_fields, load, names, resolve
from bef_jax.configs import b2, default
from bef_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TEMPLATE = """
from bef_jax.configs import default

def get_config(arg=None):
    config = default.boosted("b1")
    {line}
    return config
"""


def write_config(folder, line):
    file = folder / "mine.py"
    file.write_text(TEMPLATE.format(line=line))
    return str(file)


def test_names_are_those_of_the_folder():
    files = {file.stem for file in (ROOT / "configs").glob("*.py")} - {"__init__", "fields"}
    assert names() == sorted(files)


@pytest.mark.parametrize(
    "value", ["b2", "configs/b2.py", "./configs/b2.py", str(ROOT / "configs/b2.py")]
)
def test_a_name_and_a_path_mean_the_same(value, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load(value).to_dict() == b2.get_config().to_dict()
    assert load(f"{value}:batch_size=8,rcc.fill=white").to_dict() == (
        b2.get_config("batch_size=8,rcc.fill=white").to_dict()
    )


def test_a_file_in_the_current_folder_never_hides_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b2.py").write_text(TEMPLATE.format(line="config.name = 'mine'"))
    (tmp_path / "b2").write_text("not Python")
    assert load("b2").name == "b2"
    assert load("b2.py").name == "mine"
    assert resolve("b2.py:a=1") == "b2.py:a=1"


def test_a_config_takes_no_new_fields(tmp_path):
    config = load(write_config(tmp_path, "config.name = 'mine'"))
    with pytest.raises(AttributeError):
        config.batchsize = 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.name = nowhere", [", line 6: NameError: name 'nowhere' is not defined"]),
        ("config.batchsize = 3", [", line 6: AttributeError: ", "batch_size"]),
        ("config.name = = 3", [", line 6: SyntaxError: invalid syntax"]),
        ("open('/nowhere')", [", line 6: FileNotFoundError: ", "/nowhere"]),
        ("return None", ["get_config returned NoneType where it must return a ConfigDict"]),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(line, words, tmp_path):
    file = write_config(tmp_path, line)
    with pytest.raises(UserError) as caught:
        load(file)
    text = str(caught.value)
    assert text.startswith(file) and "\n" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("prefix", ["./", ".//", ""])
def test_a_path_that_is_not_written_in_the_shortest_way_is_named_the_same(
    prefix, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, "config.name = nowhere")
    with pytest.raises(UserError, match=r"^mine\.py, line 6: NameError"):
        load(f"{prefix}mine.py")
    with pytest.raises(UserError, match=r"^b2\.py: No such file.*--config=b2"):
        load(f"{prefix}b2.py")


def test_a_file_without_get_config_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1")
    with pytest.raises(UserError, match=r"mine.py: AttributeError: .*get_config"):
        load(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("b22", ["did you mean b2?", "quickstart", "lite0"]),
        ("quick_start:seed=3", ["did you mean quickstart?"]),
        ("/nowhere/mine.py", ["/nowhere/mine.py: No such file"]),
        ("/nowhere/b2.py", ["No such file", "--config=b2"]),
    ],
)
def test_a_missing_config_is_named(value, words):
    with pytest.raises(UserError) as caught:
        load(value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--config.batchsize=3", "batch_size"),
        ("--config.optim.lr=1", "optim.learning_rate"),
        ("-config.tta=8", "eval.tta"),
        ("--noconfig.rcc.enable", "rcc.enabled"),
        ("--config.model.stride=16", "model.total_stride"),
    ],
)
def test_the_nearest_field_is_suggested_in_full(flag, near):
    with pytest.raises(UserError, match=f"; did you mean --config.{near}\\?$"):
        check_fields(["main", flag])


def test_a_field_near_nothing_gets_no_suggestion():
    with pytest.raises(UserError, match=r"--config\.zzzzz is not a field of the configuration$"):
        check_fields(["--config.zzzzz"])


def test_every_field_is_known():
    check_fields(f"--config.{name}=1" for name in default.field_names(default.get_config()))
