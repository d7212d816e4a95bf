"""The time of each kernel of a training step, by JAX's profiler."""

import collections
import glob
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

STEPS = 3


def profile(step: Callable, compiled: jax.stages.Compiled, file: Path) -> dict:
    """Returns the device time and the slowest kernels of a step; `file` gets the first 60.

    The rest of the span from the first kernel to the last is gaps. A kernel's line has its name,
    microseconds and calls per step, and the layer that HLO names for it.
    """
    kernels = collections.defaultdict(list)
    for name, start, duration in trace(step):
        kernels[name].append((start, duration))
    events = [event for found in kernels.values() for event in found]
    layers = layers_of(compiled)
    times = {name: sum(duration for _, duration in found) for name, found in kernels.items()}
    slowest = sorted(times, key=times.get, reverse=True)[:60]
    lines = [
        [name[:90], round(times[name] / STEPS / 1e3, 1), round(len(kernels[name]) / STEPS, 1),
         layers.get(name, "")[-70:]]
        for name in slowest
    ]  # fmt: skip
    file.write_text(json.dumps(lines, indent=0))
    span = max(start + duration for start, duration in events) - min(start for start, _ in events)
    return {
        "device_us": sum(times.values()) / STEPS / 1e3,
        "span_us": span / STEPS / 1e3,
        "kernels": round(len(events) / STEPS, 1),
        "slowest": lines[:12],
    }


def trace(step: Callable) -> Iterator[tuple[str, float, float]]:
    """Yields name, start and duration, in nanoseconds, of all kernels of three steps."""
    on_cpu = jax.default_backend() == "cpu"  # where all threads count, for want of a GPU
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([step() for _ in range(STEPS)][-1])
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(file)
        for plane in (plane for plane in data.planes if on_cpu or "GPU" in plane.name):
            for line in (line for line in plane.lines if on_cpu or line.name.startswith("Stream")):
                for event in line.events:
                    yield event.name, event.start_ns, event.duration_ns


def layers_of(compiled: jax.stages.Compiled) -> dict[str, str]:
    """Returns what HLO says of each operation, by the name of its kernel."""
    named = re.findall(r'%([\w.\-]+) = .*?op_name="([^"]*)"', compiled.as_text())
    # Kernels have the operations' names, with _ for what C does not take in a name.
    return {re.sub(r"[.\-]", "_", name): layer for name, layer in named}
