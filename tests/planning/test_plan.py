import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from bef_jax.configs.default import get_config
from bef_jax.planning import chips, plan
from bef_jax.planning.plan import Figures
from bef_jax.runtime import sharding
from bef_jax.training import checkpoint
from bef_jax.training.state import abstract_state
from tests.conftest import SHRUNK

V5E = chips.by_name("v5e")


def figures(flops=0.0, hbm_traffic=0.0, collectives=None):
    return Figures(flops, hbm_traffic and 9 * hbm_traffic, hbm_traffic, 0, collectives or {}, 0.0)


# ---- what it comes to ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "seconds", "bound"),
    [
        (figures(197e12, 819e9 / 2), 1.0, "compute"),
        (figures(197e12 / 2, 2 * 819e9), 2.0, "memory"),
        # A ring of 8 passes 7/8 of the bytes on to reduce them, and 7/8 to tell everyone.
        (figures(1.0, 1.0, {"all-reduce": {"count": 1, "bytes": 200e9}}), 1.75, "interconnect"),
        (figures(1.0, 1.0, {"reduce-scatter": {"count": 2, "bytes": 200e9}}), 7.0, "interconnect"),
        (figures(1.0, 1.0, {"all-gather": {"count": 2, "bytes": 200e9}}), 0.875, "interconnect"),
    ],
)
def test_roofline_is_the_slowest_of_three(seen, seconds, bound):
    found, by = plan.roofline(seen, V5E, n=8)
    assert (found, by) == (pytest.approx(seconds), bound)


@pytest.mark.parametrize(
    ("seen", "chip"),
    [
        (figures(None, 1.0), V5E),
        (figures(1.0, None), V5E),
        (figures(1.0, 1.0), chips.by_name("cpu")),
    ],
)
def test_what_is_not_known_is_no_roofline(seen, chip):
    assert plan.roofline(seen, chip, n=8) == (None, None)


def test_libtpu_says_what_it_refuses():
    message = "RESOURCE_EXHAUSTED: ... Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
    assert plan.bytes_wanted(message) == 17.5 * 2**30
    assert plan.bytes_wanted("RESOURCE_EXHAUSTED: no more") is None


# ---- the largest batch --------------------------------------------------------------------------


def search(memory, first, capacity=1000, unit=8):
    """The batch found, and those that were measured for it."""
    asked = []

    def measure(batch):
        asked.append(batch)
        return memory(batch)

    return plan.largest_batch(measure, {first: memory(first)}, capacity, unit), asked


@pytest.mark.parametrize("first", [8, 12, 64, 192, 400])
def test_a_line_is_found_by_two_measurements_and_a_check(first):
    best, asked = search(lambda batch: 100 + 4 * batch, first)
    assert best == 224  # 225 would fit, and 8 does not divide it
    assert len(asked) <= 2 and best in asked


def test_a_bend_takes_a_further_measurement():
    best, asked = search(lambda batch: 100 + 4 * batch + max(0, batch - 128), 16)
    assert best == 200 and len(asked) <= plan.ATTEMPTS
    assert 100 + 4 * best + best - 128 <= 1000 < 100 + 4 * (best + 8) + best - 120


def test_a_compiler_that_only_refuses_is_asked_for_less():
    best, _ = search(lambda batch: 10 * batch if batch <= 64 else None, 256)
    assert best == 64


def test_nothing_fits():
    assert search(lambda batch: 2000 + batch, 64) == (None, [32, 8])


# ---- the figures of a configuration -------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "chip", "placed"),
    [
        ("host", V5E, False),
        ("device", V5E, True),
        ("auto", V5E, False),  # PCam's 7.2 GB take nearly half of one v5e's 16
        ("auto", chips.by_name("h100"), True),
        ("auto", chips.by_name("cpu"), False),
    ],
)
def test_the_split_is_placed_as_training_would(placement, chip, placed):
    config = get_config(f"data.placement={placement}")
    if chip is V5E and placement == "auto":
        config.data.train_size = 300_000
    split = plan.placed_split(config, sharding.make_mesh(), chip)
    assert (split is not None) == placed
    assert split is None or len(split.images.shape) == 4


def test_parameter_bytes_are_the_checkpoints(small_config, tmp_path):
    """Of the arrays that Orbax reads back, not of the shapes that the plan counts."""
    config = small_config()
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract_state(config))
    with_run = checkpoint.Checkpoints(tmp_path, keep=1)
    with_run.save(1, zeros, {"config": {}, "clock": {}}, None)
    with_run.close()
    everywhere = sharding.replicated(sharding.make_mesh())
    folder = next((tmp_path / "checkpoints").iterdir())
    state = checkpoint.restore(folder, abstract_state(config), everywhere)
    expected = sum(x.nbytes for x in jax.tree.leaves(state))
    assert plan.count_bytes(abstract_state(config)) == expected
    assert plan.count_bytes(abstract_state(config).params) == sum(
        x.nbytes for x in jax.tree.leaves(state.params)
    )


# ---- by the command line ------------------------------------------------------------------------


def run_plan(name, workdir, *flags):
    command = [
        sys.executable, "-m", "bef_jax.main", "--config=configs/quickstart.py", "--mode=plan",
        f"--topology={name}", f"--workdir={workdir}", "--config.compile_cache=", *flags,
        *(f"--config.{name}={SHRUNK[name]}" for name in ("rcc.min_size", "rcc.max_size")),
    ]  # fmt: skip
    return subprocess.run(command, env=os.environ, capture_output=True, text=True)


@pytest.mark.slow
def test_plan_compiles_the_step_for_eight_devices_of_this_machine(tmp_path):
    flags = ["--config.batch_size=16", "--config.bn_groups=8", "--config.data.placement=host"]
    result = run_plan("cpu:8", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    summary = json.loads(line)
    assert summary == json.loads((tmp_path / "plan_summary.json").read_text())
    assert (summary["n_devices"], summary["batch_per_device"]) == (8, 2)
    reduced = summary["collectives"]["all-reduce"]
    # Every gradient crosses, batch statistics do not.
    assert reduced["bytes"] >= summary["parameter_bytes"]
    assert summary["hbm_bytes_per_device"] > summary["state_bytes"]
    for key in ("hbm_capacity_bytes", "fits", "roofline_step_ms", "bound_by"):
        assert summary[key] is None
    assert "upper bound" in result.stderr


def test_a_batch_that_the_topology_cannot_share_is_refused(tmp_path):
    result = run_plan("cpu:8", tmp_path, "--config.batch_size=12")
    assert (result.returncode, result.stdout) == (2, "")
    assert "config.batch_size=12 can't be split over 8 devices" in result.stderr


# ---- by the compilers of other hardware ---------------------------------------------------------


def require(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: it compiles for hardware that is not here")


@pytest.mark.compilers
def test_a_tpu_slice(tmp_path):
    require("libtpu")
    flags = ["--config.bn_groups=8", "--config.batch_size=64", "--nolargest_batch"]
    result = run_plan("v5e:2x4", tmp_path, *flags, "--config.data.placement=host")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["fits"] and summary["roofline_images_per_second"] > 0
    # The optimiser reads and writes the state; most of the rest stays on the chip.
    moved = summary["hbm_traffic_per_device"]
    assert summary["state_bytes"] < moved < summary["bytes_accessed_per_device"]
    assert sum(sums["count"] for sums in summary["collectives"].values()) <= 4


@pytest.mark.compilers
def test_kernels_move_less_on_a_tpu_slice(tmp_path):
    require("libtpu")
    flags = ["--config.bn_groups=8", "--config.batch_size=1024", "--nolargest_batch"]
    flags += ["--config.dtype=bfloat16", "--config.data.placement=host"]
    # The quickstart's network is too small to show it.
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
    # Nothing is brought together for a kernel.
    assert kernels["collectives"].keys() == layers["collectives"].keys()


@pytest.mark.compilers
def test_a_gpu_node(tmp_path):
    require("jax_cuda12_plugin")
    flags = ["--config.bn_groups=8", "--config.batch_size=64", "--nolargest_batch"]
    result = run_plan("h100:8", tmp_path, *flags, "--config.data.placement=host")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["fits"] and summary["collectives"]["all-reduce"]["count"] >= 1
    assert summary["flops_per_device"] is None  # XLA's GPU compiler does not count
