"""Compares the wheel, the source distribution and the image with the repository's files."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "bef_jax"


def files(folder):
    """Returns the files of a folder of the repository, relative to it, without Python's caches."""
    found = (file for file in (ROOT / folder).rglob("*") if file.is_file())
    return {file.relative_to(ROOT / folder) for file in found if file.suffix != ".pyc"}


def build(kind, source, folder):
    """Builds what pip or `python -m build` would, without the network; returns the file."""
    # Do not import setuptools here: it refuses a process that has imported the old distutils.
    found = [d.version for d in importlib.metadata.distributions(name="setuptools")]
    if not found or int(found[0].partition(".")[0]) < 77:
        pytest.skip("setuptools is missing or older than 77")
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("bef_jax-*")
    return built


def copy(names, source):
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)


def test_pyproject_lists_every_folder_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    folders = {".".join((PACKAGE, *file.parent.parts)) for file in files(PACKAGE)}
    assert packages == sorted(folders | {"bef_jax.configs"})


def test_the_wheel_is_one_package_and_a_command(tmp_path):
    mapped = {f"bef_jax/{name}": PACKAGE / name for name in files(PACKAGE)}
    mapped |= {f"bef_jax/configs/{name}": "configs" / name for name in files("configs")}
    copy(["pyproject.toml", "README.md", "LICENSE", *mapped.values()], tmp_path / "source")
    with zipfile.ZipFile(build("wheel", tmp_path / "source", tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (commands,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "bef-jax = bef_jax.main:run" in wheel.read(commands).decode().splitlines()
    assert names == set(mapped)


def test_the_source_distribution_holds_every_tracked_file(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    if "pyproject.toml" not in tracked:
        pytest.skip("this is no git repository")
    copy(tracked, tmp_path / "source")
    with tarfile.open(build("sdist", tmp_path / "source", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked <= names, tracked - names


def test_the_image_is_made_from_files_that_docker_sees():
    steps = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for step in steps if step.startswith("COPY") for name in step.split()[1:-1]}
    ignored, *exceptions = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"
    ]
    assert ignored == "*"
    assert copied == {name[1:] for name in exceptions if name.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
