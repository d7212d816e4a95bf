"""The tested range of JAX against pyproject.toml, which pip reads, and the installed versions."""

import logging
import platform
import tomllib
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement

from bef_jax.runtime.versions import installed_versions, warn_if_untested

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    "version", ["0.9.9", "0.10.0", "0.12.0.1", "0.13.0", "0.13.0.dev1", "1.0.0"]
)
def test_it_warns_of_a_version_that_pip_would_refuse(version, caplog):
    (package,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "jax"]
    with caplog.at_level(logging.WARNING, logger="bef_jax"):
        warn_if_untested(version)
    refused = not package.specifier.contains(version, prereleases=True)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == refused
    assert all(
        version in line and str(bound) in line for line in lines for bound in package.specifier
    )


def test_the_installed_jax_is_tested(caplog):
    warn_if_untested()
    assert not caplog.records


def test_installed_versions_are_those_that_run():
    versions = installed_versions()
    assert versions.keys() == {"jax", "jaxlib", "flax", "python"}
    assert versions["jax"] == jax.__version__
    assert versions["python"] == platform.python_version()
