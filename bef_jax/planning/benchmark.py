"""--mode=benchmark: measures how fast this machine trains, infers, reads its input and augments.

Each is measured alone: two calls warm up, then each run lasts at least RUN_SECONDS. No data set is
needed, because the patches are random. Only the input comes from the configuration's store, if
there is one.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.config import check_devices
from bef_jax.data import store
from bef_jax.data.augment import augment
from bef_jax.data.batches import (
    Batch,
    gather,
    host_batches,
    make_order,
    place_split,
    put_batch,
    selections,
    should_place,
)
from bef_jax.data.patch import PCAM_SIDE, eval_side, train_side
from bef_jax.data.store import Split
from bef_jax.data.stored.rows import StoredRows
from bef_jax.errors import UserError
from bef_jax.planning import benchmark_records, chips
from bef_jax.runtime import devices, sharding
from bef_jax.runtime.compiled import flops, memory_bytes
from bef_jax.scoring.scorer import make_scorer
from bef_jax.training.packing import make_packing
from bef_jax.training.state import create_state
from bef_jax.training.step import compile_step
from bef_jax.training.step_counts import count_steps

LOG = logging.getLogger(__name__)

RUN_SECONDS = 0.2  # a run's least length, because one call of a small network is too short to time
INPUT_PATCHES = 4096  # random patches of 96 px, if there is no store; fewer if they are larger
COMPARISONS = {"lax": "native"}  # what --compare names -> config.model.depthwise


@dataclasses.dataclass(frozen=True)
class Programs:
    """The calls by which a network is timed.

    Attributes:
        calls: `train` takes the next step; `eval` scores the batch under every view of eval.tta.
        compiled: the training step.
        compile_seconds: time to compile the step, or to load it from the compilation cache.
    """

    calls: dict[str, Callable]
    compiled: jax.stages.Compiled
    compile_seconds: float


def run_benchmark(
    config: ConfigDict, compare: str | None, folder: Path | None, argv: Sequence[str]
) -> dict:
    """Measures the network of `config` at its batch size and dtype, on all devices.

    Args:
        config: the whole configuration.
        compare: "lax" also times the native depthwise convolution, in turn with ours.
        folder: a folder that keeps the summary too (`benchmark_records`).
        argv: the command line's flags, for the record.

    Returns:
        The summary; its keys are stable.

    Raises:
        UserError: `compare` or `folder` is invalid, or the devices can't share a batch.
    """
    if compare not in (None, *COMPARISONS):
        raise UserError(f"--compare={compare} is unknown: choose {' or '.join(COMPARISONS)}")
    if compare and config.model.mbconv != "layers":
        raise UserError(f"--compare={compare} compares layers: set config.model.mbconv=layers")
    mesh, machine = sharding.make_mesh(), devices.describe()
    check_devices(config, mesh)
    # Name the file first, so that a folder that can't be written costs no minutes of measuring.
    file = benchmark_records.results_file(folder, machine) if folder else None
    LOG.info("benchmark of %s on %s", config.model.name, machine)
    summary = _settings(config, machine) | _measure_all(config, mesh, compare)
    if file:
        benchmark_records.append(file, summary, argv)
        LOG.info("summary added to %s", file)
    return summary


def _settings(config: ConfigDict, machine: str) -> dict:
    """Returns what was measured, on which hardware and with which settings."""
    return {
        "mode": "benchmark",
        "hardware": machine,
        "device_kind": jax.devices()[0].device_kind,
        "n_devices": jax.device_count(),
        "model": config.model.name,
        "total_stride": config.model.total_stride,
        "mbconv": config.model.mbconv,
        "size": train_side(config),
        "eval_size": eval_side(config),
        "tta": config.eval.tta,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
    }


def _measure_all(config: ConfigDict, mesh: Mesh, compare: str | None) -> dict:
    batch_size = config.batch_size
    with _batches(config, mesh) as (batches, source):  # first, because a store can be damaged
        reading = _time_and_log("input", config, lambda: next(batches))
    # Put the batch on the devices now, because the input is measured by itself.
    patches = random_patches(batch_size, config.data.patch_size)
    batch = put_batch(patches, mesh, np.arange(batch_size))
    ours = build(config, mesh, batch)
    train = _time_and_log("training", config, ours.calls["train"])
    peak = peak_bytes(ours.compiled)  # before inference, because this is the peak so far
    evaluation = _time_and_log("inference", config, ours.calls["eval"])
    augmentation = _time_and_log("augmentation", config, _augmentation(config, batch))
    image_flops = flops_per_image(ours.compiled, config, mesh)
    rates = {"train": train, "eval": evaluation, "input": reading}
    rates = {f"{k}_images_per_second": batch_size / seconds for k, seconds in rates.items()}
    # The median, because a shared machine has some slow runs, which would move a mean.
    medians = {name: float(np.median(rate)) for name, rate in rates.items()}
    return {
        **medians,
        # Percentiles of the runs' mean steps. To time single steps, the host would have to wait for
        # each of them.
        "step_ms": {f"p{p}": float(1e3 * np.percentile(train, p)) for p in (50, 90)},
        "compile_seconds": ours.compile_seconds,
        "flops_per_image": image_flops,
        "peak_bytes": peak,
        "augment_ms": float(1e3 * np.median(augmentation)),
        "mfu": mfu(image_flops, medians["train_images_per_second"], config.dtype),
        "input": source,
        "spread": {name: [float(rate.min()), float(rate.max())] for name, rate in rates.items()},
        **({"compare": {compare: _compare(config, mesh, batch, ours, compare)}} if compare else {}),
    }


# ---- timing -------------------------------------------------------------------------------------


def _time_and_log(what: str, config: ConfigDict, call: Callable) -> np.ndarray:
    """Returns the seconds per call of each run, [runs]; a call handles one batch."""
    (seconds,) = measure(config.benchmark.runs, call)
    # The slowest run takes the most seconds, so its percentile is 100.
    slow, median, fast = config.batch_size / np.percentile(seconds, (100, 50, 0))
    LOG.info("%s: %s images/s (%s to %s)", what, *(f"{x:,.1f}" for x in (median, slow, fast)))
    return seconds


def measure(runs: int, *calls: Callable) -> np.ndarray:
    """Returns the mean seconds per call of each run, [calls, runs].

    Several calls take turns, run by run, so that a machine's slow moments hit all of them.
    """
    counts = [_warm_up(call) for call in calls]
    return np.array(
        [[_seconds(*work) for work in zip(calls, counts, strict=True)] for _ in range(runs)]
    ).T


def _warm_up(call: Callable) -> int:
    """Calls twice to warm up, and returns how many calls make a run."""
    _seconds(call, 1)
    # Time the second call, because the first one also compiles and allocates.
    return max(1, math.ceil(RUN_SECONDS / _seconds(call, 1)))


def _seconds(call: Callable, count: int) -> float:
    """Returns the mean seconds per call, of `count` calls.

    It waits for a result after it has made the next call, as training and evaluation do.
    """
    start = time.perf_counter()
    # Wait one result late, because dispatch is asynchronous. Without waiting, calls would pile up;
    # with waiting at once, the host's time would be added to the device's.
    previous = call()
    for _ in range(count - 1):
        result = call()
        jax.block_until_ready(previous)
        previous = result
    jax.block_until_ready(previous)
    return (time.perf_counter() - start) / count


# ---- what is timed ------------------------------------------------------------------------------


def build(config: ConfigDict, mesh: Mesh, batch: Batch) -> Programs:
    """Returns the programs that train a fresh network of `config` on `batch`, and score it."""
    state = create_state(config, sharding.replicated(mesh))
    # Copy the variables, because the step overwrites the state.
    scorer = make_scorer(config, mesh)(jax.tree.map(jnp.copy, state.eval_variables()))
    state = make_packing(config, mesh).pack(state)
    LOG.info("compiling with config.model.depthwise=%s", config.model.depthwise)
    start = time.perf_counter()
    compiled = compile_step(config, mesh, state)
    compile_seconds = time.perf_counter() - start

    key = jax.random.key(config.seed)
    # The labels are random, so a rate of 0 keeps the weights as they are. A step takes as long.
    rates = sharding.put_everywhere(np.zeros(1, np.float32), mesh)
    weighted = config.data.class_weights != "none"
    weights = np.ones(config.model.num_classes, np.float32) if weighted else None

    # Each call needs the newest state, because the memory of the last one was donated.
    def train():
        nonlocal state
        state, metrics = compiled(state, batch, key, rates, weights)
        return metrics

    def evaluate():
        return scorer(batch.images)

    return Programs({"train": train, "eval": evaluate}, compiled, compile_seconds)


def _augmentation(config: ConfigDict, batch: Batch) -> Callable:
    # Bind the config before jit, which would refuse it as an argument: it is not an array.
    program = jax.jit(functools.partial(augment, config=config))
    return functools.partial(program, jax.random.key(config.seed), batch.images)


def _compare(config: ConfigDict, mesh: Mesh, batch: Batch, ours: Programs, name: str) -> dict:
    """Times another form of the depthwise convolution; with a ratio above 1 ours is faster."""
    other = config.copy_and_resolve_references()
    other.model.depthwise = COMPARISONS[name]
    # Both states are in memory at once, which takes twice as much as a plain benchmark.
    theirs = build(other, mesh, batch)
    figures = {}
    for work, call in ours.calls.items():
        our_seconds, their_seconds = measure(config.benchmark.runs, call, theirs.calls[work])
        figures[f"{work}_images_per_second"] = float(config.batch_size / np.median(their_seconds))
        # The median of the ratios of neighbouring runs, not a ratio of medians, so that a slow
        # moment of the machine cancels out.
        figures[f"{work}_ratio"] = float(np.median(their_seconds / our_seconds))
        LOG.info("%s: %.2f times as fast as with %s", work, figures[f"{work}_ratio"], name)
    return figures


# ---- input --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _batches(config: ConfigDict, mesh: Mesh) -> Iterator[tuple[Iterator[Batch], dict]]:
    """Yields the batches that training would get, and where their patches come from."""
    with _input_split(config) as (split, folder):
        count_steps(config, len(split))  # raises if the split does not fill a batch
        with contextlib.closing(_gathered(split, config, mesh)) as batches:
            yield batches, {"store": folder and str(folder), "patches": len(split)}


def _gathered(split: Split, config: ConfigDict, mesh: Mesh) -> Iterator[Batch]:
    rows_of = make_order(config, split.labels)
    if not should_place(split, config.data.placement):
        return host_batches(split, mesh, rows_of, 0)
    # In training the step itself gathers; here gathering is a program of its own.
    program = jax.jit(lambda selection: gather(selection.split, selection.indices[0], mesh))
    chosen = selections(place_split(split, mesh), mesh, rows_of, 0, itertools.repeat(1))
    return (program(selection) for selection in chosen)


@contextlib.contextmanager
def _input_split(config: ConfigDict) -> Iterator[tuple[Split, Path | None]]:
    """Yields the store's training split and its folder, or random patches in a file and None."""
    folder = store.store_path(config.data)
    if (folder / store.MANIFEST).is_file():
        yield store.open_split(folder, "train"), folder
        return
    # Read them from a file, as a store's are: a gather from memory would measure something else.
    side = config.data.patch_size
    # About as many pixels at any size, because 4096 patches of 512 px would be 3 GB.
    count = INPUT_PATCHES * PCAM_SIDE**2 // side**2
    patches = random_patches(max(count, config.batch_size), side)
    with tempfile.TemporaryDirectory(prefix="bef_jax_benchmark_") as temporary:
        file = Path(temporary) / "images.npy"
        np.save(file, patches.images)
        header_bytes = file.stat().st_size - patches.images.nbytes
        images = StoredRows(file, header_bytes, patches.images.shape)
        yield dataclasses.replace(patches, images=images), None


def random_patches(n: int, side: int = PCAM_SIDE) -> Split:
    """Returns a split of n random patches with random labels, in memory."""
    # Random bytes will do, because no branch and no memory traffic depends on the pixels' values.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, 3), np.uint8)
    labels = rng.integers(0, 2, n, np.uint8)
    return Split("random", images, labels, np.arange(n).astype(str))


# ---- what the compiler and the devices report ---------------------------------------------------


def flops_per_image(compiled: jax.stages.Compiled, config: ConfigDict, mesh: Mesh) -> float | None:
    """Returns the floating-point operations of a training step per image; None if unknown.

    XLA counts them in one device's program. Of a loop, such as accumulation, it counts one turn.
    """
    total = flops(compiled)
    images = config.batch_size // config.optim.accumulate // mesh.size
    return None if total is None else total / images


def peak_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the most bytes that a device held; on CPU, which counts none, what was planned."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(device["peak_bytes_in_use"] for device in stats)
    return memory_bytes(compiled)


def mfu(image_flops: float | None, images_per_second: float, dtype: str) -> float | None:
    """Returns the share of the devices' published peak that training reaches; None if unknown.

    `image_flops` is from `flops_per_image`. XLA counts more than a network's multiply-adds, so this
    is higher than what others call MFU.
    """
    peak = chips.peak_flops(jax.devices()[0].device_kind, dtype)
    if image_flops is None or peak is None:
        return None
    return image_flops * images_per_second / (peak * jax.device_count())
