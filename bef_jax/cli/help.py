"""The texts of `--help` and `--version`; JAX is not imported, so that they are printed at once."""

import dataclasses
import inspect
import platform
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from importlib import metadata

from absl import flags
from ml_collections import ConfigDict

from bef_jax import __version__
from bef_jax.cli import config_files
from bef_jax.configs import default
from bef_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Mode:
    """A mode: its help in one line, and the fields of the configuration that its help lists.

    Attributes:
        fields: names, or beginnings of names: "data." means all fields of config.data.
    """

    line: str
    fields: tuple[str, ...]


# Two kinds of lines in configs/default.py:
#     config.eval = evaluation = ConfigDict()
#     evaluation.tta = 1  # 1 | 8: views whose probabilities are averaged
_GROUP = re.compile(r" +config\.(?P<name>\w+) = (?P<variable>\w+) = ConfigDict\(\)")
_FIELD = re.compile(r" +(?P<variable>\w+)\.(?P<name>\w+) = .+?(?:  # (?P<comment>.+))?$")


def comments() -> dict[str, str]:
    """Returns {"model.name": its meaning, ...}, from the comments of configs/default.py.

    The comment of a field is on the lines above it, or at the end of its own line.
    """
    known = default.field_names(default.get_config())
    groups = {"config": ""}  # for each variable, the start of its fields' names
    above: list[str] = []
    found = {}
    for line in inspect.getsource(default).splitlines():
        if line.startswith("    # "):
            above.append(line.strip(" #"))
            continue
        if group := _GROUP.match(line):
            groups[group["variable"]] = f"{group['name']}."
        elif field := _FIELD.match(line):
            # Where a function makes a group, as _model does, its variable is named after the group.
            name = groups.get(field["variable"], f"{field['variable']}.") + field["name"]
            text = " ".join([*above, field["comment"] or ""]).strip()
            if name in known and text:
                found[name] = text
        above = []
    return found


_OF_OTHER_MODES = ("ablation.", "benchmark.", "predict.", "slides.")
_TRAINING = tuple(name for name in comments() if not name.startswith(_OF_OTHER_MODES))
_STEP = (
    *("dtype", "batch_size", "bn_groups", "ema_decay", "label_smoothing", "data.placement"),
    *("model.", "rcc.", "augment.", "optim."),
)
_SCORES = ("eval.batch_size", "eval.tta", "eval.threshold", "compile_cache")

MODES = {
    "train": Mode("trains, or resumes; then evaluates and reports", _TRAINING),
    "eval": Mode(
        "computes metrics of a checkpoint on a split", (*_SCORES, "data.", "distributed.")
    ),
    "predict": Mode(
        "scores slides, pictures, folders, .npz, .h5 or stores", ("predict.", "slides.", *_SCORES)
    ),
    "froc": Mode("compares a run's slides with their truth: FROC, slide AUC", ()),
    "export": Mode("turns a checkpoint into StableHLO and ONNX, for serving", ("eval.threshold",)),
    "ablate": Mode("trains the rows of the paper's table, and draws it", ("ablation.", *_TRAINING)),
    "benchmark": Mode(
        "measures images/s of training, inference, input",
        ("benchmark.", "eval.tta", "data.", *_STEP),
    ),
    "plan": Mode(
        "compiles for absent hardware, and predicts memory and speed", ("data.train_size", *_STEP)
    ),
    "prepare": Mode("decodes a data set into a store", ("data.",)),
    "import_weights": Mode("turns another package's weights into a checkpoint", ("model.", "seed")),
}

_EXAMPLES = {
    "bef-jax --config=quickstart": "a first look",
    "bef-jax --config=b2 --config.data.dir=~/pcam": "trains on PCam's files",
    "bef-jax --config=b2:batch_size=128,seed=3": "with two fields changed",
    "bef-jax --mode=predict --workdir=runs/b2 --input=DIR": "scores pictures",
    "bef-jax --config=path/to/mine.py --mode=plan": "a file of your own",
}


def answer(argv: Sequence[str], known: Sequence[flags.Flag]) -> str | None:
    """Returns the text to print if `argv` asks for help or the version, else None.

    Args:
        argv: the command line, with the program's name first.
        known: the program's flags. A line of a flag's help may begin with modes ("eval, predict:
            ..."); then only these modes read it.

    Raises:
        UserError: help is asked for an unknown mode.
    """
    if "--version" in argv:
        return _version()
    if not {"-h", "-help", "--help", "-?"} & set(argv):
        return None
    mode = _mode(argv)
    return _general(known) if mode is None else _of_mode(mode, known)


def check_mode(mode: str) -> None:
    """Raises `UserError` if there is no such mode."""
    if mode not in MODES:
        near = did_you_mean(mode, MODES)
        raise UserError(f"--mode={mode} is unknown (the modes are {', '.join(MODES)}){near}")


def _version() -> str:
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax"))
    return f"bef-jax {__version__} ({packages}, Python {platform.python_version()})"


def _mode(argv: Sequence[str]) -> str | None:
    """Returns the mode of --mode=eval or --mode eval, with one dash or two; else None."""
    found = re.findall(r"(?:^| )--?mode[= ](\S+)", " ".join(argv))
    for mode in found:
        check_mode(mode)
    return found[-1] if found else None


def _general(known: Sequence[flags.Flag]) -> str:
    lines = {name: mode.line + " (default)" * (name == "train") for name, mode in MODES.items()}
    texts = {_flag_spelling(flag): "; ".join(flag.help.splitlines()) for flag in known}
    return "\n".join(
        [
            "Boosted EfficientNet in JAX: metastases, or other classes, in H&E patches.",
            "",
            "  bef-jax --config=NAME [--mode=MODE] [--workdir=DIR] [--config.FIELD=VALUE ...]",
            "  bef-jax --mode=MODE --workdir=DIR [...]     for eval, predict, froc and export",
            "",
            "Modes; bef-jax --mode=MODE --help lists the flags and fields of one:",
            *_table(lines),
            "",
            "Flags:",
            *_table(texts),
            "",
            *textwrap.wrap("Names for --config: " + ", ".join(config_files.names()), _width()),
            "",
            "Examples:",
            *_table(_EXAMPLES, widest=56),
        ]
    )


def _of_mode(mode: str, known: Sequence[flags.Flag]) -> str:
    texts = {_flag_spelling(flag): text for flag in known if (text := _help(flag, mode))}
    own = "; a checkpoint has its own values" if "--checkpoint=" in texts else ""
    return "\n".join(
        [
            f"bef-jax --mode={mode}: {MODES[mode].line}",
            "",
            "Flags:",
            *_table(texts),
            *_fields_section(mode, own),
        ]
    )


def _fields_section(mode: str, own: str) -> list[str]:
    if not MODES[mode].fields:
        return []
    title = f"Fields of the configuration and their defaults{own}:"
    return ["", title, *_table(_fields(mode))]


def _fields(mode: str) -> dict[str, str]:
    """Returns {"--config.seed=0": its meaning, ...} for the fields that `mode` reads."""
    found, values = comments(), default.get_config()
    names = [
        name
        for start in MODES[mode].fields
        for name in found
        if name == start or (start.endswith(".") and name.startswith(start))
    ]
    return {f"--config.{name}={_shown(values, name)}": found[name] for name in names}


def _help(flag: flags.Flag, mode: str) -> str:
    """Returns the help of a flag for `mode`; "" if the flag is for other modes."""
    for line in flag.help.splitlines():
        modes, colon, text = line.partition(": ")
        if not colon or not set(modes.split(", ")) <= set(MODES):
            return line
        if mode in modes.split(", "):
            return text
    return ""


def _flag_spelling(flag: flags.Flag) -> str:
    if not flag.boolean:
        return f"--{flag.name}="
    return f"--no{flag.name}" if flag.default else f"--{flag.name}"


def _shown(values: ConfigDict, name: str) -> str:
    for key in name.split("."):
        values = values[key]
    return "" if values is None else str(values)


def _width() -> int:
    return min(100, shutil.get_terminal_size().columns)


def _table(rows: dict[str, str], widest: int = 36) -> Iterator[str]:
    """Yields the lines of two columns; a text too long for the first column has its own line."""
    indent = min(widest, max(map(len, rows)) + 4)
    for left, right in rows.items():
        lines = textwrap.wrap(right, _width() - indent)
        if len(left) + 4 > indent:
            yield f"  {left}"
        else:
            yield f"  {left}".ljust(indent) + lines.pop(0)
        yield from (" " * indent + line for line in lines)
