"""What an installation holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def folders(package):
    """The dotted names of a package's folders: those that hold a file, of whatever kind."""
    files = (file for file in (ROOT / package).rglob("*") if file.is_file())
    parents = {file.parent.relative_to(ROOT).parts for file in files if file.suffix != ".pyc"}
    return {".".join(parts) for parts in parents if parts[-1] != "__pycache__"}


def test_no_folder_of_the_package_is_forgotten():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    assert packages == sorted(folders("bef_jax") | {"bef_jax.configs"})
