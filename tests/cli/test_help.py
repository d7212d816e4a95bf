"""Compares the help texts with the modes, flags and fields that exist."""

import pytest
from absl import flags

from bef_jax import main
from bef_jax.cli import help
from bef_jax.config import flatten
from bef_jax.configs import default
from bef_jax.errors import UserError

KNOWN = flags.FLAGS.get_flags_for_module("bef_jax.main")


def answer(*argv):
    return help.answer(["bef-jax", *argv], KNOWN)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_help_lists_the_modes_that_run():
    assert set(help.MODES) == set(main.MODES)


def test_help_is_one_screen_with_every_mode_and_flag():
    text = answer("--help")
    lines = text.splitlines()
    assert len(lines) <= 44 and max(map(len, lines)) <= 80
    for word in [*main.MODES, *(f"--{flag.name}=" for flag in KNOWN if not flag.boolean), "b2"]:
        assert word in text, word


@pytest.mark.parametrize("mode", help.MODES)
def test_every_prefix_of_a_mode_names_fields(mode):
    fields = flatten(default.get_config())
    for start in help.MODES[mode].fields:
        assert start in fields or any(name.startswith(start) for name in fields), start
    assert max(map(len, answer(f"--mode={mode}", "-h").splitlines())) <= 80


def test_every_field_has_a_comment_and_is_read_by_a_mode():
    fields = flatten(default.get_config())
    assert set(help.comments()) == set(fields)
    shown = "".join(answer("--help", "--mode", mode) for mode in help.MODES)
    assert all(f"--config.{name}=" in shown for name in fields)


def test_comments_of_fields_are_read_whole():
    comments = help.comments()
    assert comments["seed"] == "decides the initial weights, every batch and every augmentation"
    assert comments["eval.tta"].startswith("1 | 8: views")  # its variable has another name
    above = comments["steps_per_call"]
    assert above.startswith("Steps that one call") and above.endswith("one thread.")


def test_flags_are_shown_where_they_are_read():
    assert "--topology=" in answer("--mode=plan", "--help")
    assert "--topology=" not in answer("--mode=predict", "--help")
    of_eval, of_benchmark = (answer(f"--mode={mode}", "--help") for mode in ("eval", "benchmark"))
    assert "another checkpoint" in of_eval and "depthwise" not in of_eval.split("Fields")[0]
    assert "another checkpoint" not in of_benchmark


def test_an_unknown_mode_gets_a_suggestion():
    with pytest.raises(UserError, match=r"did you mean train\?"):
        answer("--mode=trian", "--help")


def test_a_command_that_asks_for_no_help_gets_no_answer():
    assert answer("--config=b2", "--mode=eval") is None


def test_version_names_the_versions_of_the_package_and_of_jax():
    import jax

    import bef_jax

    assert answer("--version").startswith(f"bef-jax {bef_jax.__version__} (jax {jax.__version__},")
