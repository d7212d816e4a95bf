"""Reads stderr of new processes, because pytest has its own handlers on the root logger."""

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


def stderr_of(program):
    """Returns the lines on stderr of a program that logs."""
    command = [sys.executable, "-c", SETUP + program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()


def test_a_warning_of_jax_is_one_line_and_shown_once():
    lines = stderr_of("""
for _ in range(2):
    log("jax._src.xla_bridge").warning("A GPU may be\\n  present: %s", "here")
""")
    assert lines == ["A GPU may be present: here"]


def test_the_reason_why_a_plug_in_fails_is_shown():
    lines = stderr_of("""
try:
    raise RuntimeError("the driver is\\ntoo old")
except RuntimeError:
    log("jax._src.xla_bridge").exception("calling %s.initialize()", "cuda")
""")
    assert lines == ["calling cuda.initialize(): RuntimeError: the driver is too old"]


def test_our_own_lines_are_shown_every_time():
    lines = stderr_of("""
for _ in range(2):
    log("bef_jax.train").info("saved")
""")
    assert lines == ["saved", "saved"]


def test_warnings_of_orbax_and_infos_of_jax_are_not_shown():
    lines = stderr_of("""
absl_logging.warning("Orbax has saved")
log("jax").info("Unable to initialize backend")
absl_logging.error("Orbax has failed")
""")
    assert lines == ["Orbax has failed"]


def test_errors_of_picture_libraries_are_not_shown():
    lines = stderr_of("""
log("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
log("tifffile").error("invalid offset")
""")
    assert lines == []


def test_names_from_strangers_are_escaped():
    lines = stderr_of("""
log("bef_jax.predict").warning("%s is no picture", "two\\nlines \\x1b[31m.png")
""")
    assert lines == [r"two\nlines \x1b[31m.png is no picture"]
