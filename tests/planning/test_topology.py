"""Names of topologies, and their compilers, which most tests replace."""

import importlib.util
import os

import jax
import pytest
from jax.experimental import topologies

from bef_jax.errors import UserError
from bef_jax.planning import chips, topology


@pytest.fixture(autouse=True)
def platforms():
    """Undoes what make_mesh does to the whole process: JAX may only use the CPU."""
    before = jax.config.jax_platforms
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("v5e:2x4", "TPU v5 lite", (2, 4)),
        ("v4:2x2x1", "TPU v4", (2, 2, 1)),
        ("h100:8", "NVIDIA H100 80GB HBM3", (8,)),
        ("cpu:16", "cpu", (16,)),
    ],
)
def test_a_topology_is_read_from_its_name(name, kind, shape):
    target = topology.parse(name)
    assert (target.chip.kind, target.shape) == (kind, shape)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:2x4", ["v9:2x4", "h100:8"]),
        ("v5e", ["unknown"]),
        ("h200:8", ["unknown"]),
        ("v5e:0x4", ["unknown"]),  # libtpu would divide by it
        ("v5e:2x4x", ["unknown"]),
        ("v5e:8", ["v5e takes a shape", "2x4"]),
        ("h100:2x4", ["h100 takes a number"]),
        ("h100:9", ["1 to 8"]),
    ],
)
def test_wrong_names_are_refused(name, words):
    with pytest.raises(UserError) as refusal:
        topology.parse(name)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x4", "plan"), ("l4:1", "cuda")])
def test_a_missing_compiler_is_refused_with_its_extra(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError) as refusal:
        topology.make_mesh(topology.parse(name))
    assert f'pip install "bef_jax[{extra}]"' in str(refusal.value)


@pytest.mark.parametrize("plugin", ["jax_cuda12_plugin", "jax_cuda13_plugin"])
def test_either_cuda_plug_in_compiles_for_gpus(plugin, monkeypatch):
    def describe(name, platform, **options):
        raise NotImplementedError(platform)

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == plugin or None)
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with pytest.raises(NotImplementedError, match="cuda"):
        topology.make_mesh(topology.parse("h100:8"))


def test_a_refusal_of_libtpu_becomes_one_line(monkeypatch):
    def refuse(*args, **options):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: 3x5 is\nnot divisible")

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    # make_mesh sets these only if they are missing, and would leave them set after the test.
    names = ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES",
             "TPU_ACCELERATOR_TYPE")  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "kept")
    with pytest.raises(UserError, match=r"v5e:3x5.*3x5 is not divisible$"):
        topology.make_mesh(topology.parse("v5e:3x5"))
    assert {os.environ[name] for name in names} == {"kept"}


@pytest.mark.parametrize("name", ["a100", "h100", "l4"])
def test_the_shipped_target_of_a_gpu_agrees_with_the_table_of_chips(name):
    file = topology.resources.files("bef_jax.planning") / "gpu_targets" / f"{name}.textproto"
    text, chip = file.read_text(), chips.by_name(name)
    assert f'device_description_str: "{chip.kind}"' in text
    assert f"device_memory_size: {chip.hbm_bytes:.0f}" in text
    assert f"memory_bandwidth: {chip.hbm_bandwidth:.0f}" in text
