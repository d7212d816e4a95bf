"""In a process of its own, since pytest has handlers of its own on the root logger."""

import subprocess
import sys

SETUP = """
import logging
from absl import logging as absl_logging
from bef_jax.runtime import logs

absl_logging.use_absl_handler()  # as absl's app.run does
logs.set_up()
log = logging.getLogger
"""


def said(program):
    """The lines on stderr of a program that logs."""
    command = [sys.executable, "-c", SETUP + program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()


def test_what_jax_warns_of_is_one_line_and_said_once():
    lines = said("""
for _ in range(2):
    log("jax._src.xla_bridge").warning("A GPU may be\\n  present: %s", "here")
""")
    assert lines == ["A GPU may be present: here"]


def test_of_a_failing_plug_in_the_reason_is_said():
    lines = said("""
try:
    raise RuntimeError("the driver is\\ntoo old")
except RuntimeError:
    log("jax._src.xla_bridge").exception("calling %s.initialize()", "cuda")
""")
    assert lines == ["calling cuda.initialize(): RuntimeError: the driver is too old"]


def test_our_lines_are_said_as_often_as_they_come():
    lines = said("""
for _ in range(2):
    log("bef_jax.train").info("saved")
""")
    assert lines == ["saved", "saved"]


def test_chatter_is_not_heard():
    lines = said("""
absl_logging.warning("Orbax has saved")
log("jax").info("Unable to initialize backend")
absl_logging.error("Orbax has failed")
""")
    assert lines == ["Orbax has failed"]


def test_readers_of_pictures_leave_the_word_to_us():
    lines = said("""
log("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
log("tifffile").error("invalid offset")
""")
    assert lines == []


def test_names_from_strangers_stay_in_their_line():
    lines = said("""
log("bef_jax.predict").warning("%s is no picture", "two\\nlines \\x1b[31m.png")
""")
    assert lines == [r"two\nlines \x1b[31m.png is no picture"]
