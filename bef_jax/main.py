"""The command line: flags -> one function per mode.

    python -m bef_jax.main --config=configs/b2.py [--workdir=runs/b2] [--mode=train] ...

The last line on stdout is the mode's summary, one line of JSON; everything else goes to stderr.
Exit status: 0 done, 2 a mistake of the user's, 1 a failure.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from bef_jax import evaluate, prepare, train
from bef_jax.config import validate
from bef_jax.errors import UserError

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_MODE = flags.DEFINE_string("mode", "train", "train | eval | prepare")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes; default: runs/<name>.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A checkpoint's folder; default: the best.")
_SPLIT = flags.DEFINE_string("split", None, "train | valid | test; default: test if there is one.")


def _eval(config, workdir: Path) -> dict:
    path = Path(_CHECKPOINT.value) if _CHECKPOINT.value else None
    return evaluate.run(config, workdir, path, _SPLIT.value)


MODES: dict[str, Callable] = {
    "train": train.train_and_evaluate,
    "eval": _eval,
    "prepare": prepare.run,
}


def main(_: Sequence[str]) -> int:
    """Runs the mode that the flags name and prints its summary."""
    _set_up_logging()
    try:
        summary = _run_mode()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary), flush=True)
    return 0


def _set_up_logging() -> None:
    """Lets the project speak, and of its libraries (Orbax is chatty, through absl) errors alone."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    log = logging.getLogger("bef_jax")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False


def _run_mode() -> dict:
    if _CONFIG.value is None:
        raise UserError("--config is missing: give a file, such as --config=configs/b2.py")
    mode, config = _MODE.value, _CONFIG.value
    if mode not in MODES:
        raise UserError(f"--mode={mode} is unknown: choose one of {', '.join(MODES)}")
    validate(config)
    workdir = Path(_WORKDIR.value or f"runs/{config.name}").expanduser().resolve()
    summary = MODES[mode](config, workdir)
    write_summary(workdir, mode, summary)
    return summary


def write_summary(workdir: Path, mode: str, summary: dict) -> None:
    """Writes WORKDIR/<mode>_summary.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / f".{mode}_summary.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, workdir / f"{mode}_summary.json")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; a mistake in them is one line and status 2, not absl's usage text."""
    try:
        return FLAGS(list(argv))
    except Exception as error:  # a config file is Python: it can raise anything
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
