"""Reads the value of `--config=`: the name of a configuration of the package, or a Python file."""

import importlib.machinery
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict

from bef_jax.configs import default
from bef_jax.errors import UserError, did_you_mean
from bef_jax.runtime.files import user_path

_FOLDER = Path(default.__file__).parent


class ConfigParser(flags.ArgumentParser):
    """Reads the value of a flag as `load` does."""

    syntactic_help = "a name, or a path that has a slash or ends in .py"

    def parse(self, argument: str) -> ConfigDict:
        return load(argument)

    def flag_type(self) -> str:
        return "config"


def names() -> list[str]:
    """Returns the names of the configurations in the package, sorted."""
    files = _FOLDER.glob("*.py")
    return sorted(file.stem for file in files if "\ndef get_config(" in file.read_text("utf-8"))


def resolve(value: str) -> str:
    """Returns the path of the file that `value` means, with its argument after a colon.

    A value that has a slash or ends in .py is a path. Any other value names one of the package's
    configurations: "b2:batch_size=64" becomes "/.../configs/b2.py:batch_size=64".

    Raises:
        UserError: the package has no configuration of that name.
    """
    name, colon, argument = value.partition(":")
    if "/" in name or name.endswith(".py"):
        return value
    if name not in names():
        raise UserError(
            f"no configuration has this name (the names are {', '.join(names())}; the path of a "
            f"file has a slash or ends in .py){did_you_mean(name, names())}"
        )
    return f"{_FOLDER / name}.py{colon}{argument}"


def load(value: str) -> ConfigDict:
    """Returns the configuration that `value` means, locked, so that it takes no new fields.

    Raises:
        UserError: there is no such file, or running it fails; the text names the place.
    """
    name, colon, argument = resolve(value).partition(":")
    path = str(user_path(name))  # without ./ and //, as Python names it in errors
    try:
        config = _run(Path(path)).get_config(*([argument] if colon else []))
    except UserError:  # about the argument; it says what is wrong
        raise
    except FileNotFoundError as error:
        if error.filename != path:
            raise UserError(_describe(path, error)) from error
        raise UserError(f"{path}: {error.strerror}{_suggest_name(path)}") from error
    except Exception as error:  # the file is Python code, which can raise anything
        raise UserError(_describe(path, error)) from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"{path}: get_config returned {kind} where it must return a ConfigDict")
    return config.lock()


def _run(path: Path) -> ModuleType:
    # This loader takes any suffix, because a path with a slash may have any.
    loader = importlib.machinery.SourceFileLoader("bef_jax_config", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # because dataclasses look their module up there
    loader.exec_module(module)
    return module


def _suggest_name(path: str) -> str:
    """Returns a hint to the package's own configuration, for a user without the repository."""
    name = Path(path).stem
    return f"; the package has that configuration: --config={name}" if name in names() else ""


def _describe(path: str, error: Exception) -> str:
    """Returns one line: the file, the last line of it that was reached, and the exception."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    reached = traceback.extract_tb(error.__traceback__)
    lines = [f", line {frame.lineno}" for frame in reached if frame.filename == path]
    text = " ".join(str(error).split())
    return f"{path}{lines[-1] if lines else ''}: {type(error).__name__}: {text}"


def check_fields(argv: Iterable[str]) -> None:
    """Refuses flags such as --config.batchsize=3 that set no field.

    Raises:
        UserError: a flag sets no field; the text has the one that was probably meant.
    """
    known = default.field_names(default.get_config())
    for flag in argv:
        found = re.match(r"--?(?:no)?config\.([^=]*)", flag)
        if found and found[1] not in known:
            near = did_you_mean(found[1], known, "--config.")
            raise UserError(f"--config.{found[1]} is not a field of the configuration{near}")
