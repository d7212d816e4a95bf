"""Plans of the training step, by the command line and by the compilers of other hardware."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from bef_jax.planning import chips, plan, topology
from bef_jax.planning.compiled_step import Figures
from bef_jax.runtime import sharding
from bef_jax.runtime.devices import CUDA_PLUGINS
from bef_jax.training import checkpoint
from bef_jax.training.state import abstract_state
from tests.conftest import SHRUNK


@pytest.mark.parametrize(
    ("needed", "refused", "fits"),
    [(16e9, False, True), (17e9, False, False), (None, False, None), (None, True, False)],
)
def test_a_refused_step_does_not_fit_and_an_unknown_size_gives_none(needed, refused, fits):
    figures = Figures(hbm_bytes=needed, refused=refused, seconds=0.0)
    assert plan._fits(figures, chips.by_name("v5e")) is fits
    assert plan._fits(figures, chips.by_name("cpu")) is (False if refused else None)


def test_counted_bytes_are_those_of_a_restored_checkpoint(small_config, tmp_path):
    """Compares with the arrays that Orbax reads back; the plan itself counts from shapes."""
    config = small_config()
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract_state(config))
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, zeros, {"config": {}, "clock": {}}, None)
    checkpoints.close()
    everywhere = sharding.replicated(sharding.make_mesh())
    folder = next((tmp_path / "checkpoints").iterdir())
    state = checkpoint.restore(folder, abstract_state(config), everywhere)
    expected = sum(x.nbytes for x in jax.tree.leaves(state))
    assert plan.count_bytes(abstract_state(config)) == expected
    assert plan.count_bytes(abstract_state(config).params) == sum(
        x.nbytes for x in jax.tree.leaves(state.params)
    )


@pytest.mark.parametrize(
    ("name", "flops", "kernels", "expected"),
    [
        # (ms of bytes, of arithmetic, of launches, of a step)
        ("h100:1", None, 400, (2.0, "network", 1.0, 2.0)),
        ("v5e:1x1", 197e9, None, (2.0 * 3350 / 819, 1.0, None, 2.0 * 3350 / 819)),
    ],
)
def test_the_table_has_the_time_of_each_limit(small_config, name, flops, kernels, expected):
    config, target = small_config(), topology.parse(name)
    figures = Figures(flops=flops, hbm_traffic=6.7e9, kernels=kernels, collectives={}, seconds=0.0)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    summary = plan.summarise(config, mesh, target, figures, largest=None)
    network = 1e3 * summary["model_flops_per_image"] * config.batch_size / 989e12
    expected = [network if value == "network" else value for value in expected]
    limits = ("bytes_bound_ms", "flops_bound_ms", "launch_bound_ms", "roofline_step_ms")
    assert [summary[key] for key in limits] == pytest.approx(expected)
    assert (summary["kernels"], summary["flops_per_device"]) == (kernels, flops)
    assumed = ", 2.5 us assumed for each" if kernels else ""
    rows = dict(plan._rows(summary))
    assert rows[f"time of launches{assumed}"] == ("1.00 ms" if kernels else "not reported")
    assert rows["kernels per step"] == ("400" if kernels else "not reported")
    assert rows["time of memory traffic"] == rows["time of a step, at least"]


# ---- on the command line ------------------------------------------------------------------------


def run_plan(topology, workdir, *flags):
    command = [
        sys.executable, "-m", "bef_jax.main", "--config=configs/quickstart.py", "--mode=plan",
        f"--topology={topology}", f"--workdir={workdir}", "--config.compile_cache=", *flags,
        *(f"--config.{name}={SHRUNK[name]}" for name in ("rcc.min_size", "rcc.max_size")),
    ]  # fmt: skip
    return subprocess.run(command, env=os.environ, capture_output=True, text=True)


@pytest.mark.slow
def test_plan_compiles_the_step_for_eight_devices_of_this_machine(small_config, tmp_path):
    # Eight images per device: on CPU, the gradient of a depthwise kernel adds up groups of eight.
    # With fewer, a group lies on several devices, and maps of features move between them.
    flags = ["--config.batch_size=64", "--config.bn_groups=8", "--config.data.placement=host"]
    result = run_plan("cpu:8", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    summary = json.loads(line)
    assert summary == json.loads((tmp_path / "plan_summary.json").read_text())
    assert (summary["n_devices"], summary["batch_per_device"]) == (8, 8)
    assert summary["collectives"].keys() == {"all-reduce"}
    reduced = summary["collectives"]["all-reduce"]
    # Every gradient is summed over the devices. Maps of features would be many times as large.
    assert 1 <= reduced["bytes"] / summary["parameter_bytes"] < 1.5
    # No norm waits for the statistics of other devices: that would take an all-reduce in each.
    norms = len(jax.tree.leaves(abstract_state(small_config()).batch_stats)) // 2
    assert reduced["count"] < norms
    assert summary["hbm_bytes_per_device"] > summary["state_bytes"]
    unknown = ("kernels", "bytes_bound_ms", "flops_bound_ms", "launch_bound_ms")
    for key in (*unknown, "hbm_capacity_bytes", "fits", "roofline_step_ms", "bound_by"):
        assert summary[key] is None
    assert "upper bound" in result.stderr


def test_a_batch_that_the_topology_cannot_share_is_refused(tmp_path):
    result = run_plan("cpu:8", tmp_path, "--config.batch_size=12")
    assert (result.returncode, result.stdout) == (2, "")
    assert "config.batch_size=12 can't be split over 8 devices" in result.stderr


# ---- with the compilers of other hardware -------------------------------------------------------


def require(*modules):
    if not any(map(importlib.util.find_spec, modules)):
        names = " or ".join(modules)
        pytest.skip(f"{names} is not installed: it compiles for hardware that is not here")


@pytest.mark.compilers
def test_plan_compiles_the_step_for_a_tpu_slice(tmp_path):
    require("libtpu")
    flags = ["--config.bn_groups=8", "--config.batch_size=64", "--nolargest_batch"]
    result = run_plan("v5e:2x4", tmp_path, *flags, "--config.data.placement=host")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["fits"] and summary["roofline_images_per_second"] > 0
    check_bounds(summary, peak=197e12, bandwidth=819e9, flops=summary["flops_per_device"])
    assert summary["kernels"] is summary["launch_bound_ms"] is None  # a step is one program
    # The optimiser reads and writes the state. Most of the rest stays on the chip.
    moved = summary["hbm_traffic_per_device"]
    assert summary["state_bytes"] < moved < summary["bytes_accessed_per_device"]
    assert sum(sums["count"] for sums in summary["collectives"].values()) <= 4


@pytest.mark.compilers
def test_kernels_move_less_on_a_tpu_slice(tmp_path):
    require("libtpu")
    flags = ["--config.bn_groups=8", "--config.batch_size=1024", "--nolargest_batch"]
    flags += ["--config.dtype=bfloat16", "--config.data.placement=host"]
    # The quickstart's network is too small to show a difference.
    flags += ["--config.model.name=efficientnet_b0"]
    plans = {}
    for form in ("layers", "pallas"):
        result = run_plan("v5e:2x4", tmp_path / form, *flags, f"--config.model.mbconv={form}")
        assert result.returncode == 0, result.stderr
        plans[form] = json.loads(result.stdout)
    layers, kernels = (plans[form] for form in ("layers", "pallas"))
    assert kernels["bytes_accessed_per_device"] < 0.9 * layers["bytes_accessed_per_device"]
    for key in ("hbm_traffic_per_device", "hbm_bytes_per_device"):
        assert kernels[key] < layers[key]
    # The kernels need no other kind of collective.
    assert kernels["collectives"].keys() == layers["collectives"].keys()


@pytest.mark.compilers
@pytest.mark.parametrize("accumulate", [1, 2])
def test_plan_compiles_the_step_for_a_gpu_node(tmp_path, accumulate):
    require(*CUDA_PLUGINS)
    flags = ["--config.bn_groups=8", "--config.batch_size=128", "--nolargest_batch"]
    flags.append(f"--config.optim.accumulate={accumulate}")
    result = run_plan("h100:8", tmp_path, *flags, "--config.data.placement=host")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["fits"] and summary["collectives"]["all-reduce"]["count"] >= 1
    # Every gradient is summed once in each micro-batch, with a few statistics and metrics.
    reduced = summary["collectives"]["all-reduce"]["bytes"] / summary["parameter_bytes"]
    assert accumulate <= reduced < 1.5 * accumulate
    assert summary["flops_per_device"] is None  # XLA's GPU compiler does not count
    flops = summary["model_flops_per_image"] * summary["batch_per_device"]
    check_bounds(summary, peak=989e12, bandwidth=3350e9, flops=flops)
    # The optimiser alone reads and writes the state, and has a kernel for each of its arrays.
    assert summary["hbm_traffic_per_device"] > summary["state_bytes"]
    assert 500 < summary["kernels"] / accumulate < 5000
    assert summary["launch_bound_ms"] == pytest.approx(summary["kernels"] * 0.0025)
    assert "2.5 us assumed for each" in result.stderr


def check_bounds(summary, peak, bandwidth, flops):
    """Compares the times of a plan with its figures; no other limit is longer here."""
    moved = summary["hbm_traffic_per_device"]
    assert summary["bytes_bound_ms"] == pytest.approx(1e3 * moved / bandwidth)
    assert summary["flops_bound_ms"] == pytest.approx(1e3 * flops / peak)
    assert summary["roofline_step_ms"] == summary["bytes_bound_ms"] > summary["flops_bound_ms"]
    assert summary["bound_by"] == "memory"
