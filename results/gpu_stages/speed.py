"""The stages `bench`: training and inference of this package."""

import argparse
import itertools
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.configs import default
from bef_jax.data.batches import make_order, place_split, put_batch, selections
from bef_jax.planning import benchmark
from bef_jax.runtime import sharding
from bef_jax.training.packing import make_packing
from bef_jax.training.state import create_state
from bef_jax.training.step import compile_step
from gpu_stages import emit
from gpu_stages.profiling import profile

# What timm's step does not do.
BARE = {
    "ema_decay": 0.0, "optim.clip_norm": 0.0, "rcc.enabled": False, "augment.flips": False,
    "augment.stain": 0.0, "augment.stain_shift": 0.0, "model.drop_path": 0.0,
}  # fmt: skip


def bench(options: argparse.Namespace) -> None:
    """Times training, then inference, as --mode=benchmark does; then profiles training."""
    config, mesh = make_config(options), sharding.make_mesh()
    images, calls = config.batch_size, options.calls
    programs = build_several(config, mesh, calls) if calls > 1 else build_one(config, mesh)
    record = {
        "model": config.model.name, "stride": options.stride, "batch": images, "calls": calls,
        "dtype": config.dtype, "form": options.form, "compile_seconds": programs.compile_seconds,
    }  # fmt: skip
    if options.only_compile:
        jax.block_until_ready([call() for call in programs.calls.values()])
        return emit(record)
    runs = 2 if options.tiny else 7
    seconds = median_seconds(runs, programs.calls["train"]) / calls
    record |= {"train": images / seconds, "step_ms": 1e3 * seconds}
    record["peak_bytes"] = benchmark.peak_bytes(programs.compiled)
    flops = benchmark.flops_per_image(programs.compiled, config, mesh)
    record["mfu"] = benchmark.mfu(flops, record["train"], config.dtype)
    emit(record)
    if "eval" in programs.calls:
        record["infer"] = images / median_seconds(runs, programs.calls["eval"])
        emit(record)
    if options.profile:
        file = options.out / f"profile_{options.name}.json"
        record["profile"] = profile(programs.calls["train"], programs.compiled, file)
        emit(record)


def make_config(options: argparse.Namespace) -> ConfigDict:
    """Returns the configuration of the bare step that README.md compares with timm's."""
    config = default.get_config()
    config.update_from_flattened_dict(BARE)
    config.model.name = "efficientnet_test" if options.tiny else options.subject
    config.model.total_stride, config.model.depthwise = options.stride, options.form
    config.batch_size, config.dtype = 8 if options.tiny else options.batch, options.dtype
    return config


def median_seconds(runs: int, call: Callable) -> float:
    """Returns the median of the runs' mean seconds per call."""
    return float(np.median(benchmark.measure(runs, call)))


def build_one(config: ConfigDict, mesh: Mesh) -> benchmark.Programs:
    """Returns the programs that take one step per call, on a batch from the host."""
    size = config.batch_size
    batch = put_batch(benchmark.random_patches(size), mesh, np.arange(size))
    return benchmark.build(config, mesh, batch)


def build_several(config: ConfigDict, mesh: Mesh, steps: int) -> benchmark.Programs:
    """Returns the program that takes several steps per call, from a split on the device."""
    split = benchmark.random_patches(max(benchmark.INPUT_PATCHES, config.batch_size))
    placed = place_split(split, mesh)
    state = make_packing(config, mesh).pack(create_state(config, sharding.replicated(mesh)))
    start = time.perf_counter()
    program = compile_step(config, mesh, state, placed, steps)
    compile_seconds = time.perf_counter() - start
    rows_of = make_order(config, split.labels)
    inputs = selections(placed, mesh, rows_of, 0, itertools.repeat(steps))
    key, rates = jax.random.key(config.seed), np.zeros(steps, np.float32)

    def train():
        nonlocal state
        state, metrics = program(state, next(inputs), key, rates, None)
        return metrics

    return benchmark.Programs({"train": train}, program, compile_seconds)
